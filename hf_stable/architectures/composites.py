"""Models of models: what joins the parts. The parts are found by their own entries."""

from hf_stable.architectures.description import Architecture, Member, members
from hf_stable.architectures.registry import register_architecture

for _model_type, _prefix in {
    "encoder-decoder": "EncoderDecoder",
    "vision-encoder-decoder": "VisionEncoderDecoder",
    "speech-encoder-decoder": "SpeechEncoderDecoder",
}.items():
    register_architecture(
        # Only where the widths of the two differ.
        Architecture(_model_type, layers=members(_prefix, "Model.enc_to_dec_proj", optional=True))
    )
register_architecture(
    Architecture(
        "vision-text-dual-encoder",
        heads=members("VisionTextDualEncoder", "Model.visual_projection", "Model.text_projection"),
    )
)
register_architecture(
    Architecture(
        "llava",
        layers=members("Llava", "MultiModalProjector.linear_1", "MultiModalProjector.linear_2"),
        heads=(Member("LlavaForConditionalGeneration", "lm_head"),),
    )
)
