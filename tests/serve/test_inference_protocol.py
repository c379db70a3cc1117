"""The Open Inference Protocol: Triton's own client, and requests that do not follow it."""

import json
import os

import numpy as np
import pytest

httpx = pytest.importorskip("httpx2", reason="launch/install.sh test installs it")

INFER = "/v2/models/histo_jax/infer"


def request(patches, **changes):
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(patches.shape)}
    return {"inputs": [{**tensor, "data": patches.ravel().tolist()} | changes]}


def test_tritons_client_gets_the_predictors_numbers(served, patches, predictor):
    try:
        import tritonclient.http as triton
    except ImportError:
        message = "needs tritonclient: pip install --no-deps tritonclient geventhttpclient"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    address = served.url.removeprefix("http://").rstrip("/")
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("histo_jax")
        metadata = client.get_model_metadata("histo_jax")
        assert [tensor["name"] for tensor in metadata["outputs"]] == ["probability", "logit"]
        for binary in (True, False):
            images = triton.InferInput("images", list(patches.shape), "UINT8")
            images.set_data_from_numpy(patches, binary_data=binary)
            names = ("probability", "logit")
            outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
            for chosen in (outputs, None):
                result = client.infer("histo_jax", [images], outputs=chosen, request_id="7")
                assert result.get_response()["id"] == "7"
                np.testing.assert_array_equal(result.as_numpy("probability"), predictor(patches))
                np.testing.assert_array_equal(result.as_numpy("logit"), predictor.logits(patches))


def test_json_may_be_flat_or_nested(client, patches, predictor):
    for data in (patches.ravel().tolist(), patches.tolist()):
        answer = client.post(INFER, json=request(patches, data=data)).json()
        outputs = {output["name"]: output for output in answer["outputs"]}
        assert outputs["probability"]["data"] == predictor(patches).tolist()
        assert outputs["logit"]["shape"] == [5]
    one = {**request(patches[:1]), "outputs": [{"name": "logit"}]}
    (output,) = client.post(INFER, json=one).json()["outputs"]
    assert output["data"] == predictor.logits(patches[:1]).tolist()
    none = client.post(INFER, json=request(patches[:0])).json()
    assert [output["data"] for output in none["outputs"]] == [[], []]


DATA = [0] * (96 * 96 * 3 - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [*DATA, float("nan")]}, "NaN is not a number of JSON"),
        ({"data": [*DATA, -1]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, 256]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, 0.5]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, 10**400]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, "0"]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, True]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, "0" * 10**7]}, "must be whole numbers from 0 to 255"),  # 1 TB as text
        ({"data": [*DATA, None]}, "must be whole numbers from 0 to 255"),
        ({"data": [*DATA, [0]]}, "must be numbers, as many as its shape says"),
        ({"data": DATA}, "has 27,647 numbers, and its shape 27,648"),
        ({"data": "0"}, "must be a list of numbers"),
        ({"datatype": "FP32"}, "of datatype UINT8"),
        ({"name": "input"}, "the input is images"),
        ({"shape": [1, 96, 96]}, "must be [n, 96, 96, 3]"),
        ({"shape": [1, 3, 96, 96]}, "must be [n, 96, 96, 3]"),
        ({"shape": [True, 96, 96, 3]}, "must be [n, 96, 96, 3]"),
        ({"shape": [-1, 96, 96, 3]}, "must be [n, 96, 96, 3]"),
        ({"parameters": {"shared_memory_region": "x"}}, "shared memory is not supported"),
        ({"parameters": {"binary_data_size": 3}}, "must have 27,648 bytes"),
        ({"parameters": 3}, "parameters must be an object"),
    ],
)
def test_a_tensor_that_is_wrong_is_explained(client, patches, changes, message):
    text = json.dumps(request(patches[:1], **changes))
    answer = client.post(INFER, content=text)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"[]", b"\xff", b"[" * 100_000, b'{"inputs": 1e999}', b"9" * 10_000, b"{}",
     b'{"inputs":[{}],"outputs":[{"name":"x"}]}', b'{"inputs":[],"id":7}'],
)  # fmt: skip
def test_text_that_is_no_request_is_refused(client, text):
    answer = client.post(INFER, content=text)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_headers_that_are_wrong_are_refused(client, patches):
    text = json.dumps(request(patches[:1])).encode()
    for length in ("x", "-1", str(len(text) + 1)):
        headers = {"Inference-Header-Content-Length": length}
        assert client.post(INFER, content=text, headers=headers).status_code == 400
    headers = {"Content-Encoding": "gzip"}
    assert client.post(INFER, content=text, headers=headers).status_code == 415
    for path in ("/v2/models/other", "/v2/models/histo_jax/versions/2"):
        assert client.get(path).status_code == 404
    assert client.get("/v2/models/histo_jax/versions/1").json()["versions"] == ["1"]


def test_more_patches_than_the_limit_are_refused_before_their_data(client):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [10**9, 96, 96, 3], "data": []}
    answer = client.post(INFER, json={"inputs": [tensor]})
    assert answer.status_code == 413
