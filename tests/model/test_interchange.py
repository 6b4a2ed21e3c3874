"""Weights to and from timm, MAE and transformers: their own models are the oracle for what ours compute."""

import dataclasses

import pytest
import timm
import torch
from noise import noisy
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from mug.kernels.masked_patch_loss import masked_patch_loss
from mug.model import interchange
from mug.model.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from mug.model.objectives.mug import MUGConfig
from mug.model.pixel_decoder import PixelDecoder
from mug.model.presets import ModelConfigError, resolve

BAR = 1e-4


def timm_model(config: MUGConfig, **options):
    sizes = {"img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.width}
    return timm.create_model(
        "vit_base_patch16_224", depth=config.depth, num_heads=config.heads, **sizes, **{"num_classes": 0, **options}
    ).eval()


def vit_sizes(config: MUGConfig) -> dict:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": 1e-6,
    }


def vitmae_config(config: MUGConfig) -> ViTMAEConfig:
    return ViTMAEConfig(
        **vit_sizes(config),
        decoder_hidden_size=config.pixel_width,
        decoder_num_hidden_layers=config.pixel_depth,
        decoder_num_attention_heads=config.pixel_heads,
        decoder_intermediate_size=4 * config.pixel_width,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.normalize_patches,
    )


def images(config: MUGConfig, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images, and the same normalised."""
    side = config.image_size
    image = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(3))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return image, (image / 255 - mean) / std


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# --- Ours to theirs ----------------------------------------------------------------------------------------

SIZES = ["micro", "tiny", pytest.param("small", marks=pytest.mark.slow), pytest.param("base", marks=pytest.mark.slow)]


@pytest.mark.parametrize("preset", SIZES)
@torch.inference_mode()
def test_timm_computes_our_features(make_model, preset):
    model = make_model(preset).eval()
    image, normalized = images(model.config)
    theirs = timm_model(model.config)
    theirs.load_state_dict(interchange.to_timm(model.encoder))  # strict
    assert difference(theirs.forward_features(normalized), model.encoder(image)) < BAR
    assert difference(theirs(normalized), model.encoder(image)[:, 0]) < BAR


@pytest.mark.parametrize("preset", SIZES)
@torch.inference_mode()
def test_transformers_computes_our_features_predictions_and_loss(make_model, preset, tmp_path):
    model = make_model(preset).eval()
    config = model.config
    image, normalized = images(config)
    vit = interchange.to_vit(interchange.to_timm(model.encoder))
    loaded, said = load(ViTModel, ViTConfig(**vit_sizes(config)), vit, tmp_path, add_pooling_layer=False)
    assert not any(said.values()), said
    assert difference(loaded(normalized).last_hidden_state, model.encoder(image)) < BAR

    vitmae = interchange.to_vitmae(interchange.to_mae(model))
    loaded, said = load(ViTMAEForPreTraining, vitmae_config(config), vitmae, tmp_path)
    assert not any(said.values()), said
    compare_mae(model, loaded, image, normalized)


def load(kind, config, state, folder, **options):
    """Through a file, as its users load it: names of the hub are translated by transformers itself."""
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model, said = kind.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), said


def compare_mae(model, theirs: ViTMAEForPreTraining, image, normalized) -> None:
    """The predictions of the masked patches, and the loss, with the same patches visible."""
    config = model.config
    noise = torch.rand(len(image), config.patches, generator=torch.manual_seed(1))
    order = noise.argsort(1)
    visible, masked = order[:, : config.visible], order[:, config.visible :]
    output = theirs(normalized, noise=noise)
    prediction = model.pixel_decoder(model.encoder(image, visible), visible, masked)
    for row in range(len(image)):
        assert difference(output.logits[row, masked[row]], prediction[row]) < BAR
    settings = {"mean": PIXEL_MEAN, "std": PIXEL_STD, "normalize_patches": config.normalize_patches}
    loss = masked_patch_loss(image, prediction, masked, patch_size=config.patch_size, **settings)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("preset", ["large", "huge"])
def test_large_models_fit_by_name_and_shape(preset):
    config = resolve(MUGConfig(preset))
    name = f"vit_{preset}_patch{config.patch_size}_224"
    with torch.device("meta"):
        encoder, decoder = Encoder(config), PixelDecoder(config)
        theirs = timm.create_model(name, num_classes=0).state_dict()
        vit = ViTModel(ViTConfig(**vit_sizes(config)), add_pooling_layer=False).state_dict()
        mae = ViTMAEForPreTraining(vitmae_config(config)).state_dict()
    ours = interchange.to_timm(encoder)
    assert shapes(ours) == shapes(theirs)
    assert shapes(interchange.as_mae(vit)) == shapes(ours)

    class Both:  # what to_mae takes of a MUG
        pass

    both = Both()
    both.encoder, both.pixel_decoder = encoder, decoder
    assert shapes(interchange.as_mae(mae)) == shapes(interchange.to_mae(both))


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


# --- Theirs to ours ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_our_encoder_computes_timms_features(make_model):
    """With learned positions, the class token's included, and a classifier that is left out."""
    encoder = make_model().eval().encoder
    config = make_model().config
    theirs = noisy(timm_model(config, num_classes=10))
    interchange.load_encoder(encoder, theirs.state_dict())
    image, normalized = images(config)
    assert theirs.pos_embed[:, 0].abs().min() > 0
    assert difference(encoder(image), theirs.forward_features(normalized)) < BAR


@pytest.mark.parametrize("saved", [False, True], ids=["names inside transformers", "names of the hub"])
@torch.inference_mode()
def test_our_model_computes_transformers_features(make_model, tmp_path, saved):
    model = make_model().eval()
    config = model.config
    image, normalized = images(config)
    vit = noisy(ViTModel(ViTConfig(**vit_sizes(config)))).eval()
    interchange.load_encoder(model.encoder, state_of(vit, tmp_path / "vit", saved))
    assert difference(model.encoder(image), vit(normalized).last_hidden_state) < BAR

    mae = noisy(ViTMAEForPreTraining(vitmae_config(config))).eval()
    interchange.load_encoder(model.encoder, state_of(mae, tmp_path / "mae", saved))
    noise = torch.rand(len(image), config.patches, generator=torch.manual_seed(1))
    visible = noise.argsort(1)[:, : config.visible]
    assert difference(model.encoder(image, visible), mae.vit(normalized, noise=noise).last_hidden_state) < BAR


def state_of(model, folder, saved: bool):
    from safetensors.torch import load_file

    if not saved:
        return model.state_dict()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_positions_are_maes():
    """transformers computes MAE's table by itself."""
    config = resolve(MUGConfig("tiny"))
    theirs = ViTMAEEmbeddings(vitmae_config(config))
    theirs.initialize_weights()
    assert difference(interchange.to_timm(Encoder(config))["pos_embed"], theirs.position_embeddings) < 1e-6


def test_mae_layout_has_the_published_names(make_model):
    """Of facebookresearch/mae's MaskedAutoencoderViT, one block of each stack."""
    names = {name for name in interchange.to_mae(make_model()) if "blocks.1." not in name}
    block = {
        f"{part}.{end}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for end in ENDS
    }
    assert names == {
        *("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"),
        *(f"{part}.{end}" for part in OUTSIDE for end in ENDS),
        *(f"{stack}.0.{name}" for stack in ("blocks", "decoder_blocks") for name in block),
    }


ENDS = ("weight", "bias")
OUTSIDE = ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")


@pytest.mark.parametrize("layout", ["mae", "vitmae"])
def test_round_trip_gives_the_same_weights(make_model, layout):
    model, other = make_model(), make_model(seed=8)
    state = interchange.to_mae(model)
    interchange.load_encoder(other.encoder, interchange.to_vitmae(state) if layout == "vitmae" else state)
    pairs = zip(model.encoder.parameters(), other.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(model.encoder.positions_ND, other.encoder.positions_ND)


# --- What cannot be loaded ---------------------------------------------------------------------------------


def timm_state(config, **options):
    return timm_model(config, **options).state_dict()


REFUSED = {
    "another width": ({"width": 48}, {}, "another size: cls_token is (1, 1, 48), but (1, 1, 32) in the encoder"),
    "another image size": ({"image_size": 64}, {}, "another size: pos_embed is (1, 65, 32)"),
    "fewer blocks": ({"depth": 1}, {}, "missing key blocks.1."),
    "more blocks": ({"depth": 3}, {}, "unexpected key blocks.2."),
    "pooled by mean": ({}, {"global_pool": "avg"}, "missing key norm.weight"),
    "layer scale": ({}, {"init_values": 0.1}, "unexpected key blocks.0.ls1.gamma"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_vits_are_refused_by_name(make_model, case):
    changes, options, message = REFUSED[case]
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = timm_state(dataclasses.replace(model.config, **changes), **options)
    with pytest.raises(ModelConfigError) as refused:
        interchange.load_encoder(model.encoder, state)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_third_of_qkv_is_named(make_model):
    model = make_model()
    state = interchange.to_vit(interchange.to_timm(model.encoder))
    del state["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ModelConfigError, match=r"missing key blocks\.1\.attn\.qkv\.weight"):
        interchange.load_encoder(model.encoder, state)
