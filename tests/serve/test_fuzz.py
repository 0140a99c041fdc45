"""The interface under generated requests, and the images under damage: every answer is one that is described."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs fastapi, of the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs prometheus-client, of the extra [serve]")
pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra [serve]")

from rlrr_kernels.serve.images import TooManyPixelsError, UnknownFormatError, decode
from rlrr_kernels.train.data.images import ImageError
from tests.serve.client import running
from tests.serve.served_adapters import save_marked

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def files() -> dict[str, bytes]:
    found = {}
    for kind in KINDS:
        file = io.BytesIO()
        Image.effect_noise((37, 41), 80).convert("RGB").save(file, kind)
        found[kind] = file.getvalue()
    return found


def damaged(data: bytes, draw: random.Random) -> bytes:
    """``data`` cut, repeated, or with other bytes in places: most often in the header, where sizes stand."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(min(len(changed), 64) if draw.random() < 0.6 else len(changed))
        changed[at : at + draw.choice([0, 1, 1, 4])] = bytes(
            draw.choices([0, 1, 0x7F, 0x80, 0xFF], k=draw.choice([0, 1, 1, 4]))
        )
    return bytes(changed[: draw.randrange(1, len(changed) + 1)] if draw.random() < 0.3 else changed)


def outcome(data: bytes) -> str:
    try:
        image = decode(data, 1e5)
    except (TooManyPixelsError, UnknownFormatError, ImageError) as error:
        return type(error).__name__ if str(error) else "an error without a message"
    assert image.mode == "RGB"
    assert image.width * image.height <= 1e5
    return "image"


@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged metadata
def test_damaged_images_are_read_or_refused():
    draw, found, sources = random.Random(0), set(), files()
    assert {outcome(data) for data in sources.values()} == {"image"}
    for _ in range(50):
        for data in sources.values():
            found.add(outcome(damaged(data, draw)))
    for _ in range(100):
        found.add(outcome(draw.randbytes(draw.randrange(200))))
    assert found == {"image", "TooManyPixelsError", "UnknownFormatError", "ImageError"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_server_answers_every_damaged_image_and_lives(tmp_path):
    save_marked(tmp_path / "a", "a")
    draw, sources = random.Random(1), files()
    with running(tmp_path, pixels_mp=0.1) as (client, service):
        for _ in range(60):
            for data in sources.values():
                assert client.classify("a", damaged(data, draw)).status in (200, 400, 413, 415)
        assert client.classify("a").status == 200
        assert service._open == 0


@pytest.mark.slow
def test_every_generated_request_gets_an_answer_that_is_described(tmp_path):
    """By schemathesis: valid and invalid requests from the OpenAPI description, answers held against it."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, which no extra has")
    import hypothesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # it takes any bytes for an image

    save_marked(tmp_path / "a", "a")
    with running(tmp_path, token="secret", timeout=5.0) as (client, service):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{client.port}/openapi.json")
        asked = []
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.settings(
                max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.seed(0)
            @hypothesis.given(case=operation.as_strategy())
            def check(case):
                if case.query and len(asked) % 2:
                    case.query["adapter"] = "a"  # the one there is, which generated names seldom are
                response = case.call(headers={"Authorization": "Bearer secret"})
                case.validate_response(response, excluded_checks=[positive_data_acceptance])
                asked.append(response.status_code)

            check()
        assert len(asked) >= 45
        assert {200, 404, 415} <= set(asked)
        assert not [status for status in asked if status >= 500]
        assert client.classify("a").status == 200
        assert service._open == 0
