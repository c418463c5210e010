"""`arcflow export --vae`: a small decoder in place of the base's, against diffusers' own AutoencoderTiny."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from arcflow_export.checkpoint.sources import Location
from arcflow_export.drift.comparable import check_comparable
from arcflow_export.errors import SourceError
from arcflow_export.models.vae import flux_decoder, qwen_decoder
from arcflow_export.student.load import load_student
from arcflow_export.verify.verify import FULL_VAE
from arcflow_runtime import Pipeline, cli
from arcflow_runtime.disk.bundle import Bundle
from tests.conftest import GOLDEN, export

BASE, ADAPTER = GOLDEN / "flux-tiny" / "base", GOLDEN / "flux-tiny" / "adapter"
STUDENT = ["--base", str(BASE), "--adapter", str(ADAPTER)]
#: The settings of TAEF1's config.json that differ from the class's defaults.
TAEF1 = {"latent_channels": 16}
SIZE = {"height": 48, "width": 32}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A checkpoint in TAEF1's format, 8 channels wide, with scaling and shift other than TAEF1's 1 and 0.

    Like TAEF1's repository it has weights in another format beside them.
    """
    folder = tmp_path_factory.mktemp("vae") / "taef1"
    torch.manual_seed(0)
    channels = (8, 8, 8, 8)
    model = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        scaling_factor=1.5,
        shift_factor=0.25,
        **TAEF1,
    )
    with torch.no_grad():  # images of all brightnesses, as a trained decoder's
        model.decoder.layers[-1].weight *= 4
        model.decoder.layers[-1].bias += 0.5
    model.save_pretrained(folder)
    shutil.copyfile(folder / "diffusion_pytorch_model.safetensors", folder / "taef1_decoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def bundle(vae, tmp_path_factory):
    student = load_student(Location(str(BASE)), Location(str(ADAPTER)), [], Location(str(vae)))
    return export(student, tmp_path_factory.mktemp("small") / "bundle", steps=(2, 4))


def test_images_are_those_of_diffusers(bundle, vae):
    """The bound is that of every image: 1.5 of 255 levels, since an 8-bit image is rounded."""
    with Pipeline.load(bundle) as pipe:
        latents = pipe("a red circle", seed=1, output_type="latents", **SIZE).images
        image = pipe("a red circle", seed=1, output_type="numpy", **SIZE).images
    z = torch.from_numpy(latents).unflatten(1, (3, 2)).unflatten(-1, (16, 2, 2))  # [B, h, w, C, 2, 2]
    z = z.permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 6, 4)
    model = AutoencoderTiny.from_pretrained(vae)
    # As FluxPipeline.__call__ does it.
    with torch.no_grad():
        expected = model.decode(z / model.config.scaling_factor + model.config.shift_factor).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.05, "an image of one colour would compare nothing"
    assert np.abs(image - expected).max() <= 1.5 / 255


def test_the_manifest_says_which_decoder(bundle, bundles, capsys):
    provenance = json.loads((bundle / "manifest.json").read_text())["provenance"]
    assert provenance["vae"]["name"] == "taef1" and len(provenance["vae"]["sha256"]) == 64
    assert cli.main(["inspect", str(bundle)]) == 0
    assert "vae       taef1\n" in capsys.readouterr().out
    full = bundles("flux-tiny", opset=23, steps=(2, 4))
    assert "vae" not in json.loads((full / "manifest.json").read_text())["provenance"]
    small, full = Bundle.open(bundle), Bundle.open(full)
    digest = provenance["vae"]["sha256"][:12]
    assert check_comparable(small, full) == (
        f"The decoders differ (VAE taef1 (sha256 {digest}) and the base's own VAE); that counts as drift here.",
    )


def test_a_bundle_is_verified_with_its_decoder(bundle, vae, capsys):
    """The decoder agrees with diffusers, and the distance from the base's decoder is reported without a bound."""
    small = ["--width", "32", "--height", "32", "--steps", "1", "--prompt", "a red circle"]
    assert cli.main(["verify", str(bundle), *STUDENT, "--vae", str(vae), *small, "--json"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["vae image"]["passed"] and rows["end to end: image"]["passed"]
    assert rows[FULL_VAE]["bound"] is None and rows[FULL_VAE]["error"] > 0.1
    assert cli.main(["verify", str(bundle), *STUDENT, *small]) == 1
    assert "; give the base, adapter and LoRAs it was made from" in capsys.readouterr().err


def test_what_is_refused(vae, tmp_path, capsys):
    config = json.loads((vae / "config.json").read_text())
    with pytest.raises(SourceError) as error:
        qwen_decoder(config, "float32")
    assert str(error.value) == (
        "vae: AutoencoderTiny has no variant for the latents of qwen-image, which are those of "
        "AutoencoderKLQwenImage; leave --vae out"
    )
    with pytest.raises(SourceError, match=r"^vae: a flux base must have 16 latent channels and 4 levels .*, got 4 and"):
        flux_decoder(config | {"latent_channels": 4}, "float32")
    with pytest.raises(SourceError, match=r"^vae: upsampling_scaling_factor must be 2, got 4; give TAEF1"):
        flux_decoder(config | {"upsampling_scaling_factor": 4}, "float32")
    command = ["export", *STUDENT, "--out", str(tmp_path / "out"), "--dry-run", "--vae"]
    assert cli.main([*command, str(tmp_path / "nowhere.safetensors")]) == 1
    assert "VAE: " in capsys.readouterr().err
    assert cli.main([*command, str(vae)]) == 0
    assert "vae      taef1: AutoencoderTiny in place of the base's decoder\n" in capsys.readouterr().out
