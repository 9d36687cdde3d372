"""Names of weights that were saved from within a wrapper, such as `module.` of DistributedDataParallel."""

import re
from collections.abc import Collection, Iterable, Mapping

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What PyTorch's wrappers put before any module, also in the middle of a name."""


def find_wrapper(names: Iterable[str], wanted: Collection[str]) -> Mapping[str, str]:
    r"""Find the prefix that all of a model's weights have in a file and not in the model.

    Args:
        names: of the file's tensors.
        wanted: the model's own names, with and without the part that a model without its head leaves out.

    Returns:
        Patterns to replace in the file's names, by what replaces them; none where the names are the model's own.

    >>> dict(find_wrapper(["codi.model.norm", "codi.model._orig_mod.embed", "prj.1"], {"model.norm", "model.embed"}))
    {'_orig_mod\\.': '', '^codi\\.': ''}
    """
    names = list(names)
    inside = [part for part in _INSIDE if any(part in name for name in names)]
    for part in inside:
        names = [name.replace(part, "") for name in names]
    renaming = {re.escape(part): "" for part in inside}
    if not any(name in wanted for name in names):
        counts: dict[str, int] = {}
        for name in names:
            parts = name.split(".")
            for i in range(1, len(parts)):
                if ".".join(parts[i:]) in wanted:
                    prefix = ".".join(parts[:i]) + "."
                    counts[prefix] = counts.get(prefix, 0) + 1
        # A prefix and the same with the model's own first part may both fit: the shorter one is the wrapper's.
        best = max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default=None)
        if best is not None:
            renaming[f"^{re.escape(best)}"] = ""
    return renaming
