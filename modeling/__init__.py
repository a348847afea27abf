"""The model family `cpt_moe`: a flat folder that travels to the Hub alone and imports torch, transformers, siblings.

- `configuration_cpt_moe`: `CptMoeConfig`, with the paper's five models and their tiny twins as presets.
- `modeling_cpt_moe`: `CptMoeModel` and its heads, with routers, penalties, experts and what releases rename.

Nothing is imported here, so that asking for the configuration does not load torch. The Auto classes learn the model
type from the package's front door (`hf_moe_cpt.registration`), or from a checkpoint, with `trust_remote_code=True`.
"""
