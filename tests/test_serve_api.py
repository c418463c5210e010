"""The service as OpenAI's own client sees it: every field, streams, and the exceptions that the client raises."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from PIL import Image

from arcflow_runtime import Bundle, Pipeline, RequestError
from arcflow_serve.models import open_models
from arcflow_serve.schema import GenerationRequest
from arcflow_serve.settings import Settings
from tests.conftest import SHAPES_OPTIONS
from tests.lora_slots import write_lora
from tests.serving import alone, image_of, images_of, preview_alone, serve

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles("shapes", **SHAPES_OPTIONS)


@pytest.fixture(scope="module")
def pipe(bundle):
    with Pipeline.load(bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def running(bundle):
    with serve([bundle]) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(api_key="unused", base_url=running.url + "/v1", max_retries=0) as client:
        yield client


def test_an_image_has_the_pixels_of_the_pipeline_alone(client, pipe):
    reply = client.images.generate(prompt=PROMPT, size="64x48", extra_body={"seed": 7, "num_inference_steps": 3})
    (image,) = reply.data
    assert image_of(image.b64_json).tobytes() == alone(pipe, PROMPT, 7, width=64, height=48, num_inference_steps=3)
    assert (reply.size, reply.output_format, reply.background, reply.quality) == ("64x48", "png", "opaque", "high")
    # 4 x 3 tokens of 16 pixels.
    assert reply.usage.output_tokens == 12
    assert reply.usage.total_tokens == reply.usage.input_tokens + 12
    assert image.seed == 7
    assert image.batch_size == 1
    assert {"queue", "tokenize", "encode", "backbone", "decode", "compress", "total"} <= set(image.timings_ms)


def test_the_png_records_how_to_make_it_again(client):
    reply = client.images.generate(prompt=PROMPT, extra_body={"seed": 7})
    assert image_of(reply.data[0].b64_json).text == {"prompt": PROMPT, "seed": "7", "steps": "2"}


def test_n_images_have_seeds_that_count_up(client, pipe):
    reply = client.images.generate(prompt=PROMPT, n=3, extra_body={"seed": 40})
    assert [x.seed for x in reply.data] == [40, 41, 42]
    assert [image_of(x.b64_json).tobytes() for x in reply.data] == [alone(pipe, PROMPT, s) for s in (40, 41, 42)]


def test_without_a_seed_the_reply_has_the_one_that_was_taken(client, pipe):
    first, second = client.images.generate(prompt=PROMPT, n=2).data
    assert first.seed != second.seed
    assert image_of(second.b64_json).tobytes() == alone(pipe, PROMPT, second.seed)


#: Every field of `openai.images.generate`, with values that are accepted; the SDK's own list is compared below.
ACCEPTED = {
    "prompt": ["", "x", "ein roter Kreis \u2603 \U0001f600", "\x00"],
    "model": [None, "bundle"],
    "n": [None, 1, 10],
    "size": [None, "auto", "16x16", "64x32"],
    "response_format": [None, "b64_json", "url"],
    "output_format": [None, "png", "jpeg", "webp"],
    "output_compression": [None, 100],
    "quality": [None, "auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"],
    "background": [None, "auto", "opaque"],
    "moderation": [None, "auto", "low"],
    "style": [None, "vivid", "natural"],
    "user": ["someone"],
    "safety_identifier": [None, "someone"],
    "stream": [None, False],
    "partial_images": [None, 0],
}
#: Fields and values that are refused, with the whole sentence.
REFUSED = {
    "complexity": [("low", "complexity is not supported: a student has no planning stage")],
    "frame_count": [(2, "frame_count is not supported: only still images are generated")],
    "frame_duration_ms": [(10, "frame_duration_ms is not supported: only still images are generated")],
    "svg": [({"model": "x"}, "svg is not supported: only png, jpeg and webp are written")],
    "n": [
        (0, "n must be greater than or equal to 1, got 0"),
        (11, "n must be at most 10, got 11"),
        (1.5, "n must be a valid integer, got 1.5"),
        ("2", "n must be a valid integer, got '2'"),
        (True, "n must be a valid integer, got True"),
    ],
    "prompt": [
        (None, "prompt must be a valid string, got None"),
        (["x"], "prompt must be a valid string, got a list with 1 entries"),
        ("x" * 4001, "prompt must have at most 4000 characters, got 4001"),
    ],
    "size": [
        ("64", "size must be 'auto' or WIDTHxHEIGHT in pixels such as '1024x768', got '64'"),
        ("-64x64", "size must be 'auto' or WIDTHxHEIGHT in pixels such as '1024x768', got '-64x64'"),
        ("63x64", "width must be a multiple of 16, got 63; the nearest is 64"),
        (
            "100000x10000",
            "height must be between 16 and 64 for this bundle, got 10000; "
            "export a bundle with a wider range or choose another size",
        ),
    ],
    "response_format": [("path", "response_format must be 'b64_json' or 'url', got 'path'")],
    "output_format": [("svg", "output_format must be 'png', 'jpeg' or 'webp', got 'svg'")],
    "output_compression": [
        (101, "output_compression must be less than or equal to 100, got 101"),
        (50, "output_compression must be 100 for png, which is lossless, got 50; or give output_format"),
    ],
    "background": [("transparent", "background must be 'opaque' or 'auto': images have no alpha channel")],
    "partial_images": [
        (1, "partial_images must be given together with stream=true"),
        (4, "partial_images must be less than or equal to 3, got 4"),
    ],
    "loras": [
        (
            {"style": 1.0},
            "loras must name LoRAs that this service has loaded, got 'style'; it has none. A LoRA can also be merged "
            "into a bundle, with arcflow export --lora",
        )
    ],
    "seed": [
        ("1", "seed must be a valid integer, got '1'"),
        (2**64, "seed must leave room for 1 images below 2**64, got 18446744073709551616"),
    ],
    "num_inference_steps": [(51, "num_inference_steps must be at most 50, got 51")],
    "cfg_scale": [
        (
            4,
            "cfg_scale is not supported: the field is called guidance_scale, or true_cfg_scale for guidance by a "
            "negative_prompt",
        )
    ],
    "negative_prompt": [
        (
            "blurred",
            "negative_prompt is not supported: the student is distilled to run once per step, without a negative "
            "prompt; leave it out",
        )
    ],
    "guidance_scale": [(66, "guidance_scale must be between 0 and 65, got 66.0")],
    "width": [(64, "width is not supported: give size as WIDTHxHEIGHT")],
    "promt": [("x", "unknown field 'promt'; did you mean prompt?")],
    "\u2603": [("x", "unknown field '\u2603'; see /docs for the fields")],
}


def test_the_fields_are_those_of_the_client():
    sent = set(openai.types.image_generate_params.ImageGenerateParamsBase.__annotations__) | {"stream"}
    assert sent == set(ACCEPTED) | {"complexity", "frame_count", "frame_duration_ms", "svg"}
    assert set(GenerationRequest.model_fields) - sent == {
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "true_cfg_scale",
        "loras",
    }


@pytest.mark.parametrize("name", ACCEPTED)
def test_values_that_are_accepted(running, bundle, name):
    for value in ACCEPTED[name]:
        value = bundle.name if value == "bundle" else value
        response = running.post({"prompt": "x", "size": "16x16", name: value})
        assert response.status_code == 200, (name, value, response.text)
        assert len(response.json()["data"]) == (value if name == "n" and value else 1)


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_are_refused(client, name):
    for value, sentence in REFUSED[name]:
        with pytest.raises(openai.BadRequestError) as error:
            client.images.generate(**({"prompt": "x"} | {"extra_body": {name: value}}))
        assert error.value.body["message"] == sentence
        assert error.value.param == name
        assert error.value.type == "invalid_request_error"
        assert error.value.request_id.startswith("req_")


def test_loras_of_a_request(bundles, tmp_path):
    """Images are those of a pipeline with the same LoRA, and a name that the service does not know is refused."""
    root = bundles("flux-tiny", lora_slots=("*",), lora_max_rank=32)
    file = write_lora(tmp_path / "ink.safetensors", Bundle.open(root).manifest.slots(), 4, 1)
    with serve([root], loras=(file,)) as running, Pipeline.load(root, threads=1) as pipe:
        pipe.load_lora(file)
        found = []
        for loras in ({"ink": 0.8}, {}):
            reply = running.post({"prompt": PROMPT, "size": "32x32", "seed": 7, "loras": loras}).json()
            found.append(image_of(reply["data"][0]["b64_json"]).tobytes())
            assert found[-1] == alone(pipe, PROMPT, 7, width=32, height=32, loras=loras)
        assert found[0] != found[1]
        reply = running.post({"prompt": PROMPT, "loras": {"inc": 1}})
        message = (
            "loras must name LoRAs that this service has loaded, got 'inc'; it has 'ink'. A LoRA can also be merged "
            "into a bundle, with arcflow export --lora"
        )
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, message)
        with running.client() as client:
            assert client.get("/v1/models").json()["data"][0]["arcflow"]["loras"] == ["ink"]


def test_loras_need_a_bundle_with_slots(bundle, tmp_path):
    with pytest.raises(RequestError, match=r"^--lora needs a bundle with LoRA slots, and none has any; export with "):
        open_models([bundle], Settings(loras=(tmp_path / "ink.safetensors",)))
    with pytest.raises(RequestError, match=r"^LoRAs must have different file names, got ink twice; rename one$"):
        open_models([bundle], Settings(loras=(tmp_path / "ink.safetensors", tmp_path / "b" / "ink.safetensors")))


def test_what_has_no_effect_is_said(client):
    reply = client.images.generate(prompt="x", quality="low", style="vivid", extra_body={"num_inference_steps": 1})
    assert reply.warnings == [
        "quality 'low' has no effect: a student has one quality",
        "style 'vivid' has no effect; describe it in the prompt",
        "num_inference_steps 1 gives a blurry image; use 2 or more",
    ]


def test_a_cut_prompt_is_said_to_its_own_client_only(running):
    long = "a red circle and a blue heart and a green triangle and a yellow star and a purple cross"
    assert running.post({"prompt": long}).json()["warnings"] == [
        "prompt 'a red circle and a blue heart and a gree...' was cut for T5 (text_encoder_2): 11 of 24 tokens kept"
    ]
    assert running.post({"prompt": "x"}).json()["warnings"] == []


def test_formats(client, pipe):
    reply = client.images.generate(prompt=PROMPT, output_format="jpeg", output_compression=90, extra_body={"seed": 3})
    assert image_of(reply.data[0].b64_json).format == "JPEG"
    reply = client.images.generate(prompt=PROMPT, output_format="webp", response_format="url", extra_body={"seed": 3})
    head, _, data = reply.data[0].url.partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "WEBP"
    assert reply.data[0].b64_json is None


def test_a_stream_has_an_honest_partial_image(client, pipe):
    """It is the pipeline's preview, which tests/test_preview.py proves, and the batch does not change it."""
    events = list(
        client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7}, size="64x48")
    )
    assert [e.type for e in events] == ["image_generation.partial_image", "image_generation.completed"]
    partial, completed = events
    assert partial.partial_image_index == 0
    size = {"width": 64, "height": 48}
    assert image_of(partial.b64_json).tobytes() == preview_alone(pipe, PROMPT, 7, **size)
    assert image_of(completed.b64_json).tobytes() == alone(pipe, PROMPT, 7, **size)
    for event in events:
        assert (event.size, event.quality, event.background, event.output_format) == ("64x48", "high", "opaque", "png")
        assert event.created_at > 1_700_000_000
    assert completed.usage.output_tokens == 12


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 1), (3, 3)])
def test_a_stream_has_at_most_the_partial_images_asked_for(client, asked, given):
    """Five steps have four partial images."""
    body = {"num_inference_steps": 5, "seed": 1}
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=asked, extra_body=body))
    assert [getattr(e, "partial_image_index", None) for e in events] == [*range(given), None]


def test_a_stream_of_several_images(client, pipe):
    events = list(client.images.generate(prompt=PROMPT, n=3, stream=True, extra_body={"seed": 5}))
    assert sorted(e.image_index for e in events) == [0, 1, 2]
    for event in events:
        assert image_of(event.b64_json).tobytes() == alone(pipe, PROMPT, 5 + event.image_index)


def test_the_asynchronous_client(running, pipe):
    async def ask():
        async with openai.AsyncOpenAI(api_key="x", base_url=running.url + "/v1") as client:
            stream = await client.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 9})
            return [event async for event in stream]

    events = asyncio.run(ask())
    assert image_of(events[-1].b64_json).tobytes() == alone(pipe, PROMPT, 9)


def test_an_error_before_a_stream_has_its_status(client):
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="x", stream=True, size="63x64")


def test_models(client, bundle):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (bundle.name, "model", "arcflow")
    assert model.arcflow["size"] == "64x64"
    assert model.arcflow["width_px"] == [16, 64]
    assert client.models.retrieve(bundle.name) == model
    for call in (lambda: client.models.retrieve("other"), lambda: client.images.generate(prompt="x", model="other")):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.body["message"] == f"model must be one of '{bundle.name}', got 'other'"
        assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/nothing", "GET", 404, "not_found"),
        ("/v1/images/generations", "GET", 405, "method_not_allowed"),
        ("/docs/static/../../../../etc/passwd", "GET", 404, "not_found"),
    ],
)
def test_other_addresses(running, path, method, status, code):
    with running.client() as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["x-request-id"].startswith("req_")


def test_bodies_that_are_not_requests(running):
    cases = {
        b"": ("invalid_json", "the body must be JSON in UTF-8: EOF while parsing a value at line 1 column 0"),
        b"[]": ("invalid_json", "the body must be a JSON object, got a list with 0 entries"),
        b'{"prompt": "\xff"}': ("invalid_json", None),
        b'{"prompt": "\\ud800"}': ("invalid_json", None),
        b'{"prompt": ' + b"[" * 100_000: ("invalid_json", None),
        b'{"prompt": ' + b'{"a":' * 20_000: ("invalid_json", None),
        b'{"n": 1}': ("missing_required_parameter", "prompt must be given"),
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}": (None, None),
        b'{"prompt": "x", "guidance_scale": NaN}': ("invalid_value", "guidance_scale must be a finite number, got nan"),
    }
    with running.client() as client:
        for body, (code, message) in cases.items():
            response = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400, body[:40]
            error = response.json()["error"]
            assert error["code"] == code or code is None, error
            assert error["message"] == message or message is None, error
            assert len(error["message"]) < 300


def test_other_media_types_are_refused(running):
    """A page of another site can send these without asking; JSON it cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        with running.client() as client:
            response = client.post(
                "/v1/images/generations", content=b'{"prompt": "x"}', headers={"content-type": kind} if kind else {}
            )
        assert response.status_code == 415
        assert response.json()["error"]["message"] == f"content-type must be application/json, got {kind!r}"


def test_state_and_documentation(running):
    with running.client() as client:
        assert client.get("/health").json() == {"status": "ok", "reasons": []}
        assert client.get("/ready").json() == {"status": "ready", "reasons": []}
        docs = client.get("/docs").text
        assert "https://" not in docs
        for path in ("/docs/static/swagger-ui-bundle.js", "/docs/static/swagger-ui.css", "/favicon.ico"):
            assert client.get(path).status_code == 200
        schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(GenerationRequest.model_fields)
    assert body["additionalProperties"] is False


def test_several_bundles_in_one_service(bundles, bundle, pipe, tmp_path):
    """Also with the same prompt, size and seed in one moment, each image is of its own model."""
    for name, target in (("shapes", bundle), ("tiny", bundles("flux-tiny"))):
        (tmp_path / name).symlink_to(target)
    with Pipeline.load(tmp_path / "tiny", threads=1) as tiny, serve([tmp_path / "shapes", tmp_path / "tiny"]) as both:
        assert list(both.service.models) == ["shapes", "tiny"]
        expected = {
            "shapes": alone(pipe, PROMPT, 4, width=32, height=32),
            "tiny": alone(tiny, PROMPT, 4, width=32, height=32),
        }
        assert expected["shapes"] != expected["tiny"]
        names = ["shapes", "tiny", None] * 4
        with ThreadPoolExecutor(len(names)) as pool:
            body = {"prompt": PROMPT, "seed": 4, "size": "32x32"}
            replies = list(pool.map(lambda name: both.post(body | {"model": name}), names))
        for name, reply in zip(names, replies, strict=True):
            assert reply.json()["model"] == (name or "shapes")
            assert images_of(reply)[0].tobytes() == expected[name or "shapes"]


def test_two_bundles_of_one_name(bundle):
    with pytest.raises(RequestError) as error, serve([bundle, bundle]):
        pass
    assert str(error.value) == (
        f"bundles must have different names, got {bundle.name!r} twice; rename one, or link to it"
    )


def test_a_bundle_whose_name_is_not_text(bundle, tmp_path):
    """Replies have the name, and JSON has no bytes."""
    link = tmp_path / os.fsdecode(b"b\xff")
    link.symlink_to(bundle)
    with pytest.raises(RequestError) as error, serve([link]):
        pass
    assert str(error.value) == "a bundle's name must be printable text, got 'b\\udcff'; rename it, or link to it"


def test_the_same_bytes_reach_the_pipeline_as_by_hand(client, running, pipe):
    """An SDK's call and a hand-written one give the same image (a server gave noise to the SDK only)."""
    sdk = client.images.generate(prompt=PROMPT, n=1, size="64x64", quality="auto", extra_body={"seed": 11})
    by_hand = running.post({"prompt": PROMPT, "seed": 11})
    assert image_of(sdk.data[0].b64_json).tobytes() == images_of(by_hand)[0].tobytes() == alone(pipe, PROMPT, 11)


def test_no_address_in_a_request_is_opened(running):
    """A prompt, model or user that looks like a path or URL stays a text."""
    with httpx2.Client(base_url=running.url) as client:
        for value in ("file:///etc/passwd", "http://127.0.0.1:1/", "../../../etc/passwd", "/etc/passwd"):
            reply = client.post("/v1/images/generations", json={"prompt": value, "user": value, "size": "16x16"})
            assert reply.status_code == 200
            assert reply.json()["safety_identifier"] == value
            assert client.post("/v1/images/generations", json={"prompt": "x", "model": value}).status_code == 404
