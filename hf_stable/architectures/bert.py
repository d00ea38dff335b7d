"""BERT and the encoders that are built like it: post-LN, no pre-LayerNorm to remove."""

from __future__ import annotations

from hf_stable.architectures.description import (
    Architecture,
    Attention,
    Block,
    Member,
    members,
)
from hf_stable.architectures.registry import register_architecture

__all__ = ["bert_attention", "bert_block"]


def bert_attention(
    module: str, names: tuple[str, str, str] = ("query", "key", "value"), *, is_cross: bool = False,
    biased: bool = False, returns_maps: bool = False,
) -> Attention:  # fmt: skip
    """Describe BERT's attention, whose output projection stands beside the attention itself.

    Args:
        module: "attention" or "crossattention".
        names: of the projections.
        is_cross: whether its keys come from another sequence.
        biased: whether more than the projections makes the logits.
        returns_maps: as of `Attention`.
    """
    query, key, value = (f"{module}.self.{name}" for name in names)
    return Attention(
        f"{module}.self",
        query,
        key,
        value,
        f"{module}.output.dense",
        is_cross=is_cross,
        biased=biased,
        returns_maps=returns_maps,
    )


def bert_block(class_name: str, *attentions: Attention) -> Block:
    """Describe BERT's block, with self-attention and optional cross-attention unless others are."""
    own = (bert_attention("attention"), bert_attention("crossattention", is_cross=True))
    attentions = attentions or own
    norms = tuple(f"{a.module.removesuffix('.self')}.output.LayerNorm" for a in attentions)
    return Block(
        class_name,
        attentions,
        mlp_in=("intermediate.dense",),
        mlp_out=("output.dense",),
        post_norms=(*norms, "output.LayerNorm"),
    )


_TASKS = ("ForTokenClassification.classifier", "ForQuestionAnswering.qa_outputs")

register_architecture(
    Architecture(
        "bert",
        bert_block("BertLayer"),
        layers=members("Bert", "Pooler.dense", "PredictionHeadTransform.dense"),
        heads=members(
            "Bert",
            "LMPredictionHead.decoder",
            "PreTrainingHeads.seq_relationship",
            "OnlyNSPHead.seq_relationship",
            "ForSequenceClassification.classifier",
            "ForMultipleChoice.classifier",
            *_TASKS,
        ),  # fmt: skip
        norms=members("Bert", "Embeddings.LayerNorm", "PredictionHeadTransform.LayerNorm"),
    )
)
for _model_type, _prefix in {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}.items():
    register_architecture(
        Architecture(
            _model_type,
            bert_block(f"{_prefix}Layer"),
            layers=members(_prefix, "Pooler.dense", "LMHead.dense", "ClassificationHead.dense"),
            heads=members(
                _prefix,
                "LMHead.decoder",
                "ClassificationHead.out_proj",
                "ForMultipleChoice.classifier",
                *_TASKS,
            ),  # fmt: skip
            norms=members(_prefix, "Embeddings.LayerNorm", "LMHead.layer_norm"),
        )
    )
register_architecture(
    Architecture(
        "electra",
        bert_block("ElectraLayer"),
        layers=(
            Member("ElectraModel", "embeddings_project", optional=True),  # where widths differ
            *members(
                "Electra", "GeneratorPredictions.dense", "DiscriminatorPredictions.dense",
                "ClassificationHead.dense",
            ),
            Member("ElectraSequenceSummary", "summary", optional=True),
        ),
        heads=members(
            "Electra", "ForMaskedLM.generator_lm_head", "ForCausalLM.generator_lm_head",
            "DiscriminatorPredictions.dense_prediction", "ClassificationHead.out_proj",
            "ForMultipleChoice.classifier", *_TASKS,
        ),
        norms=members("Electra", "Embeddings.LayerNorm", "GeneratorPredictions.LayerNorm"),
    )
)  # fmt: skip
