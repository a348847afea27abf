"""The `cpt_moe` model and its heads: a pre-norm decoder with dense or mixture-of-experts feed-forward blocks.

B batch, S sequence, H hidden size, V vocabulary, T = B x S tokens, E routed experts, K experts per token.
Source: arXiv 2503.05029 (architecture); code form: transformers' own MoE models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .configuration_cpt_moe import CptMoeConfig
from .experts_cpt_moe import CptMoeExperts, CptMoeMLP, CptMoeSparseMoeBlock
from .layers_cpt_moe import CptMoeAttention, CptMoeRotaryEmbedding, norm_of
from .losses_cpt_moe import penalty_weight, router_penalties, token_mask_of
from .releases_cpt_moe import (
    CACHE_NAME,
    refuses_unread_keywords,
    takes_either_cache_name,
    warn_of_untested_release,
)
from .routers_cpt_moe import CptMoeRouter


logger = logging.get_logger(__name__)

warn_of_untested_release()


@dataclass
class CptMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """What the language model returns. The losses never hide in one another:

    loss: what a trainer minimises. In training `lm_loss` + weighted penalties; in evaluation equal to `lm_loss`.
    lm_loss: cross entropy alone. aux_loss, z_loss: the penalties, summed over layers, before coefficient and weight;
    None where no router logits were recorded.
    router_logits, router_indices: per layer (T, E) and (T, K), the latter the experts really used.
    logits: None where a head fused with its loss took the place of `head_and_loss` and never formed them.
    """

    lm_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


class CptMoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: CptMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_moe = config.num_experts > 0
        self.self_attn = CptMoeAttention(config, layer_idx)
        self.mlp = CptMoeSparseMoeBlock(config) if self.is_moe else CptMoeMLP(config, config.intermediate_size)
        self.input_layernorm = norm_of(config)
        self.post_attention_layernorm = norm_of(config)

    @takes_either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H); token_mask: (T,) bool, False for padding."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, token_mask) if self.is_moe else self.mlp(normed))


class CptMoePreTrainedModel(PreTrainedModel):
    """Weight initialisation, recorded outputs and what transformers must know about the family."""

    config_class = CptMoeConfig
    config: CptMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CptMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(CptMoeRouter, index=0),
        "router_indices": OutputRecorder(CptMoeRouter, index=2),
        "hidden_states": CptMoeDecoderLayer,
        "attentions": CptMoeAttention,
    }

    def __init__(self, config: CptMoeConfig, *args, **kwargs) -> None:
        config.check_architecture()  # again: fields may have been set since the configuration was built
        super().__init__(config, *args, **kwargs)

    # transformers looks for the two interfaces in the text of this file, but they are used in its siblings.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our kernels on a GPU where their package is imported, else transformers' choice; what is asked for wins."""
        if requested_experts is None and self.config.is_moe and "hf_moe_cpt" in ALL_EXPERTS_FUNCTIONS:
            if torch.cuda.is_available():
                requested_experts = "hf_moe_cpt"
            else:
                logger.warning_once(
                    "No GPU for the hf_moe_cpt kernels: experts run with transformers' own implementation."
                )
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """small_init (std sqrt(2 / 5H)) for input matrices, wang_init (std 2 / (layers sqrt H)) for output ones.

        A given `initializer_range` is the std of all of them instead. Source: GPT-NeoX.
        """
        hidden_size, std = self.config.hidden_size, self.config.initializer_range
        input_std = (2 / (5 * hidden_size)) ** 0.5 if std is None else std
        output_std = 2 / (self.config.num_hidden_layers * hidden_size**0.5) if std is None else std
        if isinstance(module, nn.Linear):
            is_output = getattr(module, "is_output_projection", False)
            init.normal_(module.weight, std=output_std if is_output else input_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=input_std)
        elif isinstance(module, CptMoeExperts):
            init.normal_(module.gate_up_proj, std=input_std)
            init.normal_(module.down_proj, std=output_std)
        elif isinstance(module, CptMoeRouter):
            init.normal_(module.weight, std=input_std)
        else:
            super()._init_weights(module)

    def num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False, only_active: bool = False
    ) -> int:
        """Count as transformers does; `only_active` leaves out the E - K routed experts that a token does not use."""
        total = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if not only_active:
            return total
        unused = self.config.num_experts - self.config.num_experts_per_tok
        for module in self.modules():
            if isinstance(module, CptMoeExperts):
                counted = [p for p in module.parameters() if p.requires_grad or not only_trainable]
                total -= sum(p.numel() // self.config.num_experts * unused for p in counted)
        return total


def records_routers_on_request(forward: Callable) -> Callable:
    """For the decoder: `output_router_logits` of the configuration is a wish of the language model, for its loss."""

    @wraps(forward)
    def on_request(self: nn.Module, *args, **kwargs):
        kwargs.setdefault("output_router_logits", False)
        return forward(self, *args, **kwargs)

    return on_request


class CptMoeModel(CptMoePreTrainedModel):
    """Decoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__(config)
        # No padding_idx: where the end-of-text token also pads, its embedding would never train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([CptMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = norm_of(config)
        self.rotary_emb = CptMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        if config.is_moe:
            # transformers would do so when the routers are first recorded, which torch.compile cannot trace.
            maybe_install_capturing_hooks(self)

    @takes_either_cache_name
    @refuses_unread_keywords
    @records_routers_on_request
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Token ids or embeddings -> hidden states (B, S, H).

        Packed documents are told apart by `position_ids` that restart, given without `attention_mask`. Recorded on
        request: `output_router_logits`, `output_router_indices`, `output_hidden_states`, `output_attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # The mask is made from what the caller passed: a fresh cache would hide packed documents from it, and without
        # position ids there is nothing to look for, which saves a device synchronisation.
        create_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = create_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        token_mask = token_mask_of(attention_mask, inputs_embeds.shape[1])
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                token_mask=token_mask,
                **{CACHE_NAME: past_key_values},  # by this name gradient checkpointing looks for it
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: past_key_values if use_cache else None},
        )


class CptMoeForCausalLM(CptMoePreTrainedModel, GenerationMixin):
    """Decoder with a language-model head; reports the pure loss and the router penalties apart."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__(config)
        self.model = CptMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_either_cache_name
    @refuses_unread_keywords
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CptMoeCausalLMOutput:
        """Logits (B, S, V), or of the last `logits_to_keep` positions, and with `labels` (B, S) the losses.

        labels are shifted here, -100 is ignored. output_router_logits records the routers; the default is that of the
        configuration in training with labels, else False. In training with labels the penalties are added to `loss`,
        with their coefficients and `penalty_weight`.
        skip_logits: for a fused head, see `head_and_loss`.
        """
        is_asked = bool(output_router_logits)
        if output_router_logits is None:
            output_router_logits = self.training and labels is not None and self.config.output_router_logits
        output_router_indices = kwargs.pop("output_router_indices", False) or output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_indices=output_router_indices,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, lm_loss = self.head_and_loss(outputs.last_hidden_state[:, kept, :], labels, skip_logits, **kwargs)
        loss = lm_loss
        aux_loss = z_loss = None
        if outputs.get("router_logits"):
            is_trained_on = self.training and labels is not None
            token_mask = token_mask_of(attention_mask, outputs.last_hidden_state.shape[1])
            # Who asks in training without labels weighs the penalties himself, as a trainer of several terms does.
            is_needed = is_trained_on or (is_asked and self.training and torch.is_grad_enabled())
            over_all_ranks = is_needed and self._counts_over_all_ranks()
            aux_loss, z_loss = self._router_penalties(outputs, token_mask, is_trained_on, over_all_ranks)
            if is_trained_on:
                counted = (kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"), token_mask)
                weight = penalty_weight(labels, *counted, over_all_ranks)
                loss = lm_loss + self._weighted_penalty(aux_loss, z_loss, weight).to(lm_loss.device)
        return CptMoeCausalLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits") or None,
            router_indices=outputs.get("router_indices") or None,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )

    def head_and_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Hidden states (B, S, H) -> logits (B, S, V) and, with labels, the cross entropy.

        The seam for a head fused with its loss: set on one model, it takes this method's place there. Where
        skip_logits is true (None: in training) it may return None for the logits; this definition never does.
        """
        logits = self.lm_head(hidden_states)
        if labels is None:
            return logits, None
        return logits, self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)

    def _router_penalties(
        self,
        outputs: MoeModelOutputWithPast,
        token_mask: torch.Tensor | None,
        is_trained_on: bool,
        over_all_ranks: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if is_trained_on and torch.is_grad_enabled() and self.model.gradient_checkpointing:
            self._refuse_reentrant(self.model._gradient_checkpointing_func)
        return router_penalties(outputs.router_logits, outputs.router_indices, token_mask, over_all_ranks)

    def _counts_over_all_ranks(self) -> bool:
        """Ranks meet only where the loss needs them to: uneven evaluation batches must not wait for each other."""
        return self.config.load_scope == "global" and self.config.router_aux_loss_coef > 0

    def _weighted_penalty(
        self, aux_loss: torch.Tensor, z_loss: torch.Tensor, weight: torch.Tensor | float
    ) -> torch.Tensor:
        penalty = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        return penalty * (weight.to(penalty.device) if isinstance(weight, torch.Tensor) else weight)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ) -> None:
        if enable and self.config.has_router_penalty:
            self._refuse_reentrant(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _refuse_reentrant(self, checkpointing_func: Callable) -> None:
        if getattr(checkpointing_func, "keywords", {}).get("use_reentrant") and self._has_penalty_coefficient():
            raise ValueError(
                "use_reentrant=True checkpointing cuts the router penalties off from the routers: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set both router loss coefficients to 0.'
            )

    def _has_penalty_coefficient(self) -> bool:
        return self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0


class CptMoeForSequenceClassification(GenericForSequenceClassification, CptMoePreTrainedModel):
    """Decoder with a linear classifier on each sequence's last token; its loss holds no router penalty."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: CptMoeConfig) -> None:
        # Not the mixin's own constructor: it asks AutoModel for the decoder, which remote code has not registered.
        CptMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = CptMoeModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = ["CptMoeForCausalLM", "CptMoeForSequenceClassification", "CptMoeModel", "CptMoePreTrainedModel"]
