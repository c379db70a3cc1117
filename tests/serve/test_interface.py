"""Probabilities, attributions and heat maps by HTTP are those of the functions of the package."""

import base64
import concurrent.futures
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import histo_jax
from histo_jax.config import HeatmapConfig
from histo_jax.report.attribution import attribute
from histo_jax.report.patches import draw_attribution


def picture(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_probabilities_are_the_predictors_in_the_order_of_the_files(
    client, form, patches, predictor
):
    answer = client.post("/v1/predict", files=form, data={"previews": "true"})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result["name"] for result in results] == [f"p{n}.tif" for n in range(5)]
    assert [result["probability"] for result in results] == predictor(patches).tolist()
    assert [result["logit"] for result in results] == predictor.logits(patches).tolist()
    assert answer.json()["threshold"] == 0.25
    assert answer.json()["threshold_source"] == "95% specificity in validation"
    assert [result["is_positive"] for result in results] == (predictor(patches) >= 0.25).tolist()
    np.testing.assert_array_equal(picture(results[3]["preview"]), patches[3])


def test_a_file_that_cannot_be_used_is_named_and_the_others_are_scored(
    client, encode, patches, predictor
):
    whole, odd = encode(patches[4], "PNG"), patches[0][:, :50]
    grey = Image.fromarray(patches[2]).convert("L")
    files = [
        ("empty", b"", "is empty"),
        ("text.tif", b"no image", "is not a TIFF, PNG or JPEG file"),
        ("cut.png", encode(patches[0], "PNG")[:-3000], "is not a readable image"),
        ("odd.png", encode(odd, "PNG"), "is 50x96 pixels; the network needs 96x96"),
        ("../../etc/<script>alert(1)</script>.png", whole, ""),
        ("large.jpg", encode(np.zeros((200, 100, 3), np.uint8), "JPEG"), "is 100x200 pixels"),
        ("deep.png", encode(Image.fromarray(np.zeros((96, 96), np.uint16)), "PNG"), "has 16 bits"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n", "is not a TIFF"),
        ("grey.png", encode(grey, "PNG"), ""),
    ]
    answer = client.post("/v1/predict", files=[("files", (n, c)) for n, c, _ in files])
    results = answer.json()["results"]
    assert [result["name"] for result in results] == [name for name, _, _ in files]
    for result, (_, _, error) in zip(results, files, strict=True):
        assert result.get("error", "").startswith(error)
        assert ("probability" in result) == (not error)
    assert results[4]["probability"] == predictor(patches[4:])[0]
    assert results[8]["conversions"] == ["greyscale"]
    assert [bool(result.get("is_larger")) for result in results] == [n == 5 for n in range(9)]


def test_the_attribution_is_that_of_the_report(client, encode, patches, predictor):
    answer = client.post("/v1/attribution", files={"file": ("p.tif", encode(patches[3]))})
    assert answer.headers["content-type"] == "image/png"
    expected = draw_attribution(patches[3], attribute(predictor, patches[3:4])[0])
    shown = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    np.testing.assert_allclose(shown, expected, atol=1)


@pytest.fixture(scope="module")
def region(tissue_pixels):
    return tissue_pixels(448, 400, (96, 128, 160), border=64)


def test_a_heat_map_of_a_picture_has_the_probability_of_each_cell(
    client, encode, region, predictor
):
    options = {"probabilities": "true", "tissue": "all"}
    answer = client.post(
        "/v1/heatmap", files={"file": ("r.png", encode(region, "PNG"))}, data=options
    )
    assert answer.status_code == 200, answer.text
    result = answer.json()
    assert (result["mpp_x"], result["mpp_source"], result["stride"]) == (0.972, "assumed", 32)
    values = np.array(result["probabilities"])
    assert values.shape == (14, 13) == (result["rows"], result["columns"])
    padded = np.pad(region, ((32, 64), (32, 64), (0, 0)), constant_values=255)
    for row, column in ((0, 0), (5, 4), (13, 12), (7, 12)):
        window = padded[32 * row :, 32 * column :][:96, :96]
        assert values[row, column] == pytest.approx(predictor(window[None])[0], abs=1e-6)
    assert result["highest"] == pytest.approx(values.max(), abs=1e-7)
    assert picture(result["map"]).size == (13, 14)
    assert picture(result["thumbnail"]).size == (400, 448)
    assert (result["map_width"], result["map_height"]) == (104, 100)
    tissue = client.post(
        "/v1/heatmap", files={"file": ("r.png", encode(region, "PNG"))}, data={"stride": "64"}
    ).json()
    assert 0 < tissue["cells"] < 49
    assert "probabilities" not in tissue
    coarse = client.post(
        "/v1/heatmap", files={"file": ("r.png", encode(region, "PNG"))}, data={"mpp": "0.486"}
    ).json()
    assert (coarse["rows"], coarse["mpp_source"]) == (7, "given")


def test_a_slide_of_the_folder_has_the_map_of_the_command_heatmap(
    client, slide_folder, predictor, tmp_path
):
    assert client.get("/v1/slides").json() == {"slides": [{"id": "case_1"}]}
    result = client.post(
        "/v1/heatmap", files={"slide": (None, "case_1"), "probabilities": (None, "true")}
    ).json()
    options = HeatmapConfig(threshold=0.25)
    histo_jax.heatmap(predictor, slide_folder / "case 1.tif", tmp_path, options)
    summary = json.loads((tmp_path / "case_1" / "slide.json").read_text())
    for name in ("cells", "highest", "mean_top_percent", "share_above", "tissue_mm2", "mpp_source"):
        assert result[name] == pytest.approx(summary[name], abs=1e-6), name
    assert np.sum(np.array(result["probabilities"]) != None) == summary["cells"]  # noqa: E711


def test_a_slide_that_was_removed_is_unknown(tmp_path, encode, patches):
    pytest.importorskip("openslide", reason="the extra slides is not installed")
    from histo_jax.serve.slide_folder import SlideFolder

    (tmp_path / "a.png").write_bytes(encode(patches[0], "PNG"))
    slides = SlideFolder(str(tmp_path))
    assert slides.get("a").path == tmp_path / "a.png"
    (tmp_path / "a.png").unlink()
    assert slides.get("a") is None


def test_progress_comes_in_lines_of_json(client, encode, region):
    answer = client.post(
        "/v1/heatmap",
        files={"file": ("r.png", encode(region, "PNG"))},
        headers={"Accept": "application/x-ndjson"},
    )
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert all(line.keys() == {"done", "cells"} for line in lines[:-1])
    assert lines[-1]["cells"] > 0
    assert "map" in lines[-1]
    failed = client.post(
        "/v1/heatmap",
        files={"file": ("r.png", b"no picture")},
        headers={"Accept": "application/x-ndjson"},
    )
    assert failed.text.splitlines()[-1].startswith('{"error":"r.png is not a TIFF, PNG or JPEG')


@pytest.mark.parametrize(
    ("path", "form", "status", "message"),
    [
        ("predict", {"other": (None, "x")}, 422, "the form has no files"),
        ("predict", {"files": (None, "x")}, 422, "the form has no files"),
        ("predict", {"files": ("a", b"x"), "previews": (None, "yes")}, 422, "previews is 'yes'"),
        ("attribution", {"file": ("a", b"x")}, 422, "a is not a TIFF, PNG or JPEG file"),
        ("attribution", {"files": ("a", b"x")}, 422, "the form has 0 files"),
        ("heatmap", {"mpp": (None, "1")}, 422, "send one picture"),
        ("heatmap", {"slide": (None, "../outside/secret")}, 404, "the slide is not in the folder"),
        ("heatmap", {"slide": (None, "link")}, 404, "the slide is not in the folder"),
        ("heatmap", {"file": ("a", b"x"), "mpp": (None, "nan")}, 422, "mpp is 'nan'"),
        ("heatmap", {"file": ("a", b"x"), "stride": (None, "33")}, 422, "stride is '33'"),
        ("heatmap", {"file": ("a", b"x"), "tissue": (None, "/etc")}, 422, "tissue is '/etc'"),
        ("heatmap", {"file": ("a", b"x")}, 422, "a is not a TIFF, PNG or JPEG file"),
    ],
)
def test_a_form_that_cannot_be_used_is_explained(client, path, form, status, message):
    answer = client.post(f"/v1/{path}", files=form)
    assert (answer.status_code, answer.json()["error"][: len(message)]) == (status, message)


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-16"])
def test_a_form_in_a_rare_charset_is_refused(client, charset):
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="\xff"\r\n\r\nx\r\n--b--'
    answer = client.post("/v1/predict", content=form, headers={"Content-Type": kind})
    assert (answer.status_code, "send UTF-8" in answer.json()["error"]) == (415, True)
    kind = kind.replace(charset, "UTF-8")
    answer = client.post("/v1/predict", content=form, headers={"Content-Type": kind})
    assert answer.status_code == 200


def test_the_model_is_described_without_paths(client, run):
    text = client.get("/v1/model").text
    model = json.loads(text)
    assert (model["name"], model["positive"], model["size"]) == ("dark run", "tumour", 96)
    (scores,) = model["scores"]
    assert (scores["auc"], scores["auc_low"], scores["slide_disjoint"]) == (0.934, 0.912, True)
    assert str(run.parent) not in text


def test_clients_share_batches(start, form, encode, patches, predictor):
    httpx = pytest.importorskip("httpx2")
    with start() as server:
        sizes = []
        count = server.service.thread._on_batch
        server.service.thread._on_batch = lambda number: (sizes.append(number), count(number))
        files = {"files": ("p.tif", encode(patches[4]))}
        with httpx.Client(base_url=server.url, timeout=60) as client:
            send = lambda _: client.post("/v1/predict", files=files).json()["results"]  # noqa: E731
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                results = list(pool.map(send, range(48)))
            many = client.post("/v1/predict", files=form * 4).json()["results"]
            metrics = client.get("/metrics").text
    assert {result[0]["probability"] for result in results} == {predictor(patches[4:])[0]}
    assert sum(sizes) == 48 + 20
    assert max(sizes) == 8
    assert len(sizes) < 48
    assert [result["probability"] for result in many] == 4 * predictor(patches).tolist()
    route = r'histo_jax_requests_total\{route="/v1/predict",status="200"\} 49.0'
    assert re.search(route, metrics)
    assert "histo_jax_batch_patches_sum 68.0" in metrics
