"""Synthetic tasks, each a module that is found by the name of its task.

It holds a frozen dataclass of the task's settings, whose first field is `task: Literal[...]`, and two functions.
`count(config)` returns how many distinct questions exist (None if that is not known), and `draw(config, rng)` draws one
example. A question determines its steps and its answer, so two examples are equal if and only if their questions are.
"""
