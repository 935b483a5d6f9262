"""Fisher information as people read it: metrics of every layer and head, tables, reports, and a hook for training.

Planners use the same numbers (`calibration.planners`). The names are those of the field's tools: `trace`, `eigmax`, `cond`,
`energy_r8`, `energy_r16`, `effective_rank`, `df` (`calibration.fim.spectrum.metrics`).
"""
