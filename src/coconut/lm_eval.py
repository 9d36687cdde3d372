"""A trained entry for lm-evaluation-harness, the package `lm_eval`, which nothing else here needs.

```python
import lm_eval
from coconut.lm_eval import ThinkingLM

model = ThinkingLM("latent_3")
task = model.task("data/examples/test.jsonl", max_new_tokens=16)
lm_eval.simple_evaluate(model, tasks=[task])["results"]["thoughts"]["accuracy,none"]  # that of metrics.json
```

Tasks that compare the probabilities of given texts are refused: such a text would stand where the answer's mark is.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.evaluation.answers import same_answer
from coconut.evaluation.outcomes import read_answer
from coconut.reasoner import Reasoner

try:
    _Base: Any = importlib.import_module("lm_eval.api.model").LM
except ImportError:
    _Base = object


class ThinkingLM(_Base):  # type: ignore[misc]
    """A reasoner as the harness asks models: it thinks, and then writes greedily."""

    def __init__(self, folder: Path | str, *, device: str = "cpu", batch_size: int = 64) -> None:
        """Open a checkpoint of this pipeline, or an entry by its name; see `Reasoner.from_pretrained`."""
        super().__init__()
        self.reasoner = Reasoner.from_pretrained(folder, device=device)
        self.batch_size = batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the text after each context, cut at the first of the texts `until`.

        Raises:
            ValueError: if a task wants samples; as `Reasoner.solve`.
        """
        texts: dict[int, str] = {}
        limits = [request.args[1].get("max_gen_toks") for request in requests]
        if any(request.args[1].get("do_sample") for request in requests):
            raise ValueError("do_sample: found true, wanted a task that is answered greedily; set do_sample: false")
        for limit in dict.fromkeys(limits):
            places = [place for place, other in enumerate(limits) if other == limit]
            questions = [requests[place].args[0] for place in places]
            solutions = self.reasoner.solve(questions, max_new_tokens=limit, batch_size=self.batch_size)
            for place, solution in zip(places, solutions, strict=True):
                until = requests[place].args[1].get("until") or []
                ends = [solution.text.find(end) for end in ([until] if isinstance(until, str) else until) if end]
                texts[place] = solution.text[: min((end for end in ends if end >= 0), default=None)]
        return [texts[place] for place in range(len(requests))]

    def loglikelihood(self, _requests: Sequence[Any]) -> Any:
        """Refuse, as every task that does not let the model write."""
        raise ValueError("this task compares probabilities of given texts; wanted one with output_type: generate_until")

    loglikelihood_rolling = loglikelihood

    def task(self, examples: Path | str, *, max_new_tokens: int, name: str = "thoughts") -> dict[str, Any]:
        """Return the task of a file of `data/examples`, judged as the stage `evaluate` does by default."""

        def judge(example: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
            found = read_answer(results[0], self.reasoner.meta.answer)
            return {"accuracy": float(same_answer(found, example["answer"]))}

        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(examples)}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "process_results": judge,
            "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
        }
