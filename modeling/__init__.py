"""The model family `cpt_moe`: a flat folder that travels to the Hub alone and imports torch, transformers, siblings.

- `configuration_cpt_moe`: `CptMoeConfig`; `presets_cpt_moe`: the paper's five models and their tiny twins.
- `modeling_cpt_moe`: `CptMoeModel` and its heads; `layers_cpt_moe`: norms, rotary positions, attention.
- `releases_cpt_moe`: what transformers calls the cache, and keywords that nobody reads.
- `experts_cpt_moe`: feed-forward blocks; `routers_cpt_moe`: which experts see a token; `losses_cpt_moe`: penalties.

Nothing is imported here, so that asking for the configuration does not load torch. The Auto classes learn the model
type from the package's front door (`hf_moe_cpt.registration`), or from a checkpoint, with `trust_remote_code=True`.
"""
