"""The GPT and its heads. This file is copied into saved model folders as remote code, with those that it imports.

Shapes: B batch size, T input tokens, S tokens that attention sees (input and cache), D model width (`n_embd`),
V vocabulary size.
"""

# No `from __future__ import annotations` here: transformers reads the annotation of `**kwargs` at run time.

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chunked_loss import can_skip_logits, projected_loss
from .configuration_gpt_kit import GPTKitConfig
from .packed_documents import (
    LENGTHS,
    attends_by_lengths,
    check_ids,
    count_positions,
    document_lengths,
    document_mask,
    last_tokens,
    select_positions,
)
from .positions import RotaryEmbedding, SinusoidalPositions, constants_device
from .transformer_block import MultiHeadAttention, TransformerBlock, create_norm


class GPTKitPreTrainedModel(PreTrainedModel):
    """The properties of the GPT that the transformers library reads."""

    config: GPTKitConfig
    config_class = GPTKitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TransformerBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": TransformerBlock,
        "attentions": MultiHeadAttention,
    }


class GPTKitModel(GPTKitPreTrainedModel):
    """The GPT without its output projection: token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: GPTKitConfig) -> None:
        super().__init__(config)
        config.validate()  # fields may have been assigned one by one, which checks no rules between them
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_positions: nn.Module | None = None
        self.rotary_emb: RotaryEmbedding | None = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.n_embd)
        elif config.position_embedding == "sinusoidal":
            self.embed_positions = SinusoidalPositions(config.max_position_embeddings, config.n_embd)
        else:
            self.rotary_emb = RotaryEmbedding(config)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(TransformerBlock(config, index) for index in range(config.n_layer))
        self.norm = create_norm(config)
        positions = torch.arange(config.max_position_embeddings, device=constants_device())
        self.register_buffer("position_ids", positions[None], persistent=False)
        self.position_ids: Tensor  # (1, max_position_embeddings)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as GPT-2: normal(0, 0.02), but residual projections with std 0.02 / sqrt(2 n_layer).

        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. With
        `zero_init_residual` these start at zero: each block is the identity at first (Zhang et al. 2019, "Fixup").
        """
        super()._init_weights(module)
        # transformers calls this for modules with own parameters or buffers only, so never for a whole block.
        blocks = [layer for layer in self.layers if isinstance(layer, TransformerBlock)]
        if any(module is block.self_attn.o_proj or module is block.mlp.down_proj for block in blocks):
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, std=0.0 if self.config.zero_init_residual else std)
        elif isinstance(module, SinusoidalPositions):
            # Models are built on the meta device, so a buffer that no checkpoint holds must be filled here.
            init.copy_(module.weight, module.table())
        elif module is self:
            init.copy_(self.position_ids, torch.arange(self.position_ids.shape[1])[None])

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the hidden states (B, T, D) after the final norm.

        Packed documents are marked by `position_ids` (B, T) that restart at 0; they do not attend to each other.
        Without `position_ids`, positions are counted from `attention_mask` (B, S), so a padded row gives the same
        result as the row alone. Raises ValueError if a row is longer than `max_position_embeddings`, and for ids
        outside of their table (on the CPU only: reading the ids would stall an accelerator).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        first_layer = self._first_local_layer()
        past = past_key_values.get_seq_length(first_layer) if past_key_values is not None else 0
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size, "input_ids", "vocab_size")
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T) -> (B, T, D)
        assert inputs_embeds is not None

        # The mask is built before the cache: transformers detects packed documents only while there is no cache.
        by_lengths = attends_by_lengths(
            self.config, inputs_embeds, attention_mask, past_key_values, training=self.training
        )
        if self.config._attn_implementation == "sdpa" and not by_lengths and "cache" not in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name not in LENGTHS}
        lengths: dict[str, Any] = {}
        if by_lengths and position_ids is not None and "cu_seq_lens_q" not in kwargs:
            lengths = document_lengths(position_ids.expand(inputs_embeds.shape[0], -1), attention_mask, past)
            kwargs.update(lengths)
        causal_mask = None
        # Lengths that were found here also separate padding; those that were given do not.
        if not lengths and not (by_lengths and attention_mask is None and "cu_seq_lens_q" in kwargs):
            causal_mask = document_mask(
                self.config, inputs_embeds, attention_mask, position_ids, past_key_values, past, first_layer
            )
        if position_ids is None:
            table = self.position_ids.to(inputs_embeds.device)  # the same device, unless the model is on "meta"
            position_ids = count_positions(table, inputs_embeds.shape[1], attention_mask, past)
        else:
            check_ids(position_ids, self.config.max_position_embeddings, "position_ids", "max_position_embeddings")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        rotation = None if self.rotary_emb is None else self.rotary_emb(position_ids, hidden_states.dtype)
        if first_layer == 0:  # later pipeline stages receive hidden states that already include the positions
            if self.embed_positions is not None:
                positions = self.embed_positions(position_ids)  # (B, T) or (1, T) -> (B, T, D) or (1, T, D)
                hidden_states = hidden_states + positions.to(hidden_states.dtype)
            hidden_states = self.dropout(hidden_states)
        # The current n_layer, not len(layers): early-exit decoding lowers it while drafting.
        for layer in self.layers[: self.config.n_layer]:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotation,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _first_local_layer(self) -> int:
        """Return the index of the first layer in this process, or the number of layers if there is none.

        Pipeline parallelism replaces the layers of other stages by nn.Identity; their cache entries stay empty.
        """
        local = (index for index, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity))
        return next(local, len(self.layers))


class GPTKitForCausalLM(GPTKitPreTrainedModel, GenerationMixin):
    """The complete GPT: token ids (B, T) -> `.logits` (B, T, V), where logits t predict token t + 1."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GPTKitConfig) -> None:
        super().__init__(config)
        self.model = GPTKitModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return the logits (B, T, V) and, with labels, the loss.

        `labels` (B, T) are the input ids, with -100 at untrained tokens; the model shifts them. `shift_labels` (B, T)
        are already shifted: target t is token t + 1. The loss is the mean over trained tokens, or their sum divided by
        `num_items_in_batch`. With `skip_logits` the loss is computed block by block and `logits` is None: with a large
        vocabulary, the logits take most of the memory of a training step.
        """
        # Not a named parameter: Trainer expects every parameter with "label" in its name in each batch, and reports
        # no evaluation loss if one is missing.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = select_positions(outputs.last_hidden_state, logits_to_keep)
        logits, loss, has_labels = None, None, labels is not None or shift_labels is not None
        if shift_labels is not None:
            shift_labels = shift_labels.contiguous()  # the loss calls view(-1), which slices of batches do not allow
        if has_labels and skip_logits and can_skip_logits(self.lm_head, hidden_states):
            loss = projected_loss(self.lm_head, hidden_states, labels, shift_labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)  # (B, T, D) -> (B, T, V)
            if has_labels:
                loss = self.loss_function(
                    logits, labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels, **kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        # The default `max_length` of a model is its context: no contradiction to `max_new_tokens`, of which to warn.
        if generation_config.max_new_tokens and generation_config.max_length == self.generation_config.max_length:
            generation_config.max_length = None
        return super()._prepare_generated_length(generation_config=generation_config, **kwargs)


class GPTKitForSequenceClassification(GPTKitPreTrainedModel):
    """The GPT with an answer a row: token ids (B, T) -> `.logits` (B, num_labels) of the last token before padding."""

    def __init__(self, config: GPTKitConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GPTKitModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=config.score_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Return the logits and, with labels (B,) or (B, num_labels), the loss that `config.problem_type` names.

        Padding, on either side, is what `attention_mask` hides; without a mask, the ids `config.pad_token_id`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        last = last_tokens(outputs.last_hidden_state, input_ids, attention_mask, self.config.pad_token_id)
        logits = self.score(select_positions(outputs.last_hidden_state, last).squeeze(1))  # (B, 1, D) -> (B, L)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GPTKitForTokenClassification(GenericForTokenClassification, GPTKitPreTrainedModel):
    """The GPT with an answer a token: token ids (B, T) -> `.logits` (B, T, num_labels)."""

    # Not the generic constructor, here and below: it asks AutoModel, which may not know code that came with a folder.
    def __init__(self, config: GPTKitConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = GPTKitModel(config)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.score = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()


class GPTKitForQuestionAnswering(GenericForQuestionAnswering, GPTKitPreTrainedModel):
    """The GPT that marks an answer in its input: token ids (B, T) -> `.start_logits`, `.end_logits` (B, T)."""

    def __init__(self, config: GPTKitConfig) -> None:
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = GPTKitModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()


__all__ = [
    "GPTKitForCausalLM",
    "GPTKitForQuestionAnswering",
    "GPTKitForSequenceClassification",
    "GPTKitForTokenClassification",
    "GPTKitModel",
    "GPTKitPreTrainedModel",
]
