"""What a user can do about the end of a stage: one message for known failures, none for defects of ours."""

import traceback

from coconut.files import explain

_AGAIN = "`dvc repro` continues from the last saved state"
_NO_MEMORY = (
    "out of memory: set runtime.micro_batch or runtime.eval_batch lower, or runtime.checkpoint_activations: true, or"
    f" end other programs; {_AGAIN}"
)
_NO_SHARED_MEMORY = "shared memory is full: enlarge /dev/shm (in a container: `--shm-size`)"
_NO_GPU = f"the GPU or its driver failed: {_AGAIN}; if it fails again, see the system's log, or set runtime.device: cpu"
_NO_WORKER = "a worker process ended, mostly because the machine was out of memory: set runtime.num_workers lower"
_CURES = {
    "out of memory": _NO_MEMORY,
    "can't allocate memory": _NO_MEMORY,
    "cannot allocate memory": _NO_MEMORY,
    "status_alloc_failed": _NO_MEMORY,
    "bad_alloc": _NO_MEMORY,
    "shared memory": _NO_SHARED_MEMORY,
    "shm_open": _NO_SHARED_MEMORY,
    "cuda error": _NO_GPU,
    "cuda driver": _NO_GPU,
    "cudnn": _NO_GPU,
    "cublas": _NO_GPU,
    "nccl": _NO_GPU,
    "hip error": _NO_GPU,
    "device-side assert": _NO_GPU,
    "dataloader worker": _NO_WORKER,
    "terminated abruptly": _NO_WORKER,
}
"""What to do about an error that holds these words, in lower case; the first ones count."""


def describe(error: BaseException) -> str | None:
    """Say in one message what ended a stage and what to do about it; None for a defect, which needs its traceback."""
    if isinstance(error, MemoryError):
        return _explain_words("out of memory", str(error) or "MemoryError")
    if isinstance(error, (ValueError, OSError)):
        return explain(error)
    if not isinstance(error, RuntimeError):
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    return _explain_words(text, text) or _explain_model(error, text)


def _explain_words(words: str, text: str) -> str | None:
    cures = (cure for known, cure in _CURES.items() if known in words.lower())
    return next((f"{text[:300]}; {cure}" for cure in cures), None)


def _explain_model(error: BaseException, text: str) -> str | None:
    """Name the line of a model's own code in which an error arose; None if it arose elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    of_model = [frame for frame in frames if "/transformers/models/" in frame.filename.replace("\\", "/")]
    if not of_model:
        return None
    place = of_model[-1].filename.replace("\\", "/").partition("/transformers/models/")[2]
    return (
        f"the model's own code failed at transformers/models/{place}:{of_model[-1].lineno}: {text[:300]}; it may not"
        " support how it is used here (padded batches, vectors as input): set runtime.fast: false, or choose another"
        " model. The traceback is in the log file"
    )
