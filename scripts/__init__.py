"""One file a job, each with `main(argv)`: `hf-moe-cpt <job>`, `python scripts/<job>.py` or accelerate launch.

`recipes/` holds the settings of whole runs, to be given as `--config recipe:NAME`.
"""
