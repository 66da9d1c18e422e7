"""A Stable-Diffusion-format pipeline small enough to be made in a second: real classes, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = (
    *("a", "red", "green", "blue", "yellow", "purple", "white"),
    *("circle", "square", "triangle", "cross"),
)
"""What the tokenizer knows as whole words; other lower-case words fall apart into letters."""

MAX_TOKENS = 16
"""Context length of the text encoder, start and end token included."""

LATENT_SHAPE = (4, 4, 4)
"""Latents of one sample; images are 32 px."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tiny_pipeline(
    folder: str | Path,
    *,
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
    seed: int = 0,
    shallow: bool = False,
) -> Path:
    """Write a pipeline that `StableDiffusionPipeline.from_pretrained(folder)` loads offline; returns `folder`.

    shallow: a denoiser of one level with one transformer, a third of the modules; ZeRO-3's time goes by their number.

    The weights are random but not degenerate: decoded images have contrast and depend on their latents, and the
    denoiser's output depends on latents, timestep and prompt. Same seed, same bytes.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_unet(shallow),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                set_alpha_to_one=False,
                steps_offset=1,
                clip_sample=False,
                timestep_spacing="trailing",
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_tiny_xl_pipeline(folder: str | Path, *, seed: int = 0, zero_null: bool = True) -> Path:
    """The same of Stable Diffusion XL: two text encoders, a UNet that is told sizes, and the scheduler that XL comes with."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = _tokenizer(), _tokenizer()
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(first, layers=2),
            text_encoder_2=_text_encoder(second, layers=2, made=CLIPTextModelWithProjection),
            tokenizer=first,
            tokenizer_2=second,
            unet=_unet(
                shallow=False,
                cross_attention_dim=32,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
            force_zeros_for_empty_prompt=zero_null,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_tiny_3_pipeline(folder: str | Path, *, seed: int = 0, t5: bool = True) -> Path:
    """The same of Stable Diffusion 3: a transformer that was "trained" by flow matching, two CLIPs that project, a T5."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = _tokenizer(), _tokenizer()
        pipeline = StableDiffusion3Pipeline(
            vae=_vae(shift_factor=0.1),
            text_encoder=_text_encoder(first, layers=2, made=CLIPTextModelWithProjection),
            text_encoder_2=_text_encoder(second, layers=2, made=CLIPTextModelWithProjection),
            text_encoder_3=_t5() if t5 else None,
            tokenizer=first,
            tokenizer_2=second,
            tokenizer_3=_t5_tokenizer() if t5 else None,
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_tiny_aura_flow(folder: str | Path, *, seed: int = 0) -> Path:
    """The same of AuraFlow: joint and single blocks, one T5 whose every layer has its own positions."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = UMT5Config(
            vocab_size=64, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
        transformer = AuraFlowTransformer2DModel(
            sample_size=LATENT_SHAPE[-1],
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
        for name, module in transformer.named_modules():  # by which a block's output is weighed
            if name.endswith(("norm1.linear", "norm1_context.linear")):
                _scale(module, 10.0)
        _scale(transformer.proj_out, 5.0)  # that two updates show
        pipeline = AuraFlowPipeline(
            vae=_vae(),
            text_encoder=UMT5EncoderModel(config).eval(),
            tokenizer=_t5_tokenizer(),
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def edit_json(file: Path, **values: Any) -> None:
    """Set some of a JSON object's values, such as of a part's config.json."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CLIP_FEATURES = 8
"""Width of the tiny CLIP's embeddings."""


def make_tiny_clip(folder: str | Path) -> Path:
    """Write a CLIP of random weights, for 32-px images, with its tokenizer and image processor; returns `folder`."""
    folder = Path(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"projection_dim": CLIP_FEATURES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_factor=10.0, **sizes,
        )  # fmt: skip
        vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=CLIP_FEATURES)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_head(file: str | Path) -> Path:
    """Write a linear head on the tiny CLIP's features, as `clip_head:FILE@CLIP` reads it; returns `file`."""
    generator = torch.Generator().manual_seed(0)
    save_file({"weight": torch.randn(1, CLIP_FEATURES, generator=generator), "bias": torch.tensor([5.0])}, file)
    return Path(file)


def _tokenizer() -> CLIPTokenizer:
    """Byte pairs that build each word from its left end; longer words first, lest 'r e' of red splits green."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocab = {token: index for index, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    merges: list[tuple[str, str]] = []
    for word in sorted(WORDS, key=len, reverse=True):
        symbols = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(symbols)):
            pair = ("".join(symbols[:end]), symbols[end])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
    for token in (_START, _END):
        vocab[token] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    for word in WORDS:
        assert tokenizer(word).input_ids == [vocab[_START], vocab[word + "</w>"], vocab[_END]], word
    return tokenizer


def _text_encoder(tokenizer: CLIPTokenizer, *, layers: int = 1, made: Any = CLIPTextModel) -> Any:
    encoder = made(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # The default initial scale (0.02) would make all prompts nearly the same.
    _scale(encoder.get_input_embeddings(), 50.0)
    return encoder.eval()


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS), ("▁", -3.0)]
    letters = [(chr(code), -8.0) for code in range(ord("a"), ord("z") + 1)]
    return T5TokenizerFast(vocab=[*pieces, *letters], extra_ids=0)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=64, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def _transformer() -> SD3Transformer2DModel:
    """Its last projection and the modulations are as random as the rest: fresh ones are zero."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SHAPE[-1],
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.dim() > 1 and parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
            if name.startswith(("norm_out", "proj_out")):
                parameter.normal_(std=0.3)
    return transformer.eval()


def _vae(**changes: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        **changes,
    )
    return vae.eval()


def _unet(shallow: bool, **changes: Any) -> UNet2DConditionModel:
    levels: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
    }
    if shallow:
        levels = {
            "down_block_types": ("CrossAttnDownBlock2D",),
            "mid_block_type": None,
            "up_block_types": ("UpBlock2D",),
            "block_out_channels": (16,),
        }
    unet = UNet2DConditionModel(
        sample_size=LATENT_SHAPE[-1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **({"cross_attention_dim": 16} | levels | changes),
    )
    # Fresh cross attention is a whisper; let the prompt count.
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            _scale(module, 6.0)
    return unet.eval()


@torch.no_grad()
def _scale(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.mul_(factor)
