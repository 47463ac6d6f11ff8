"""The parts of the job spec, one module per noun; `overpaint_shared.job` puts them together."""
