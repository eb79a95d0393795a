"""Asks a server by tritonclient's own clients, as their users do, and prints the logits that each was told.

It runs in an environment of its own, where tritonclient is, and torchrec_amort is not.
"""

import json
import sys

import numpy as np
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http

grpc_address, http_address, path = sys.argv[1:]
with open(path) as file:
    columns = json.load(file)
found = {}
for protocol, module, address in (("grpc", by_grpc, grpc_address), ("http", by_http, http_address)):
    client = module.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("films")
    about = client.get_model_metadata("films")
    assert (about["name"] if protocol == "http" else about.name) == "films"
    inputs = []
    for name, (datatype, shape, values) in columns.items():
        array = np.array(values, {"INT64": np.int64, "FP32": np.float32}[datatype]).reshape(shape)
        tensor = module.InferInput(name, shape, datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer("films", inputs)
    found[protocol] = result.as_numpy("logits").tolist()
    outputs = [module.InferRequestedOutput("num_candidates")]
    found[f"{protocol} counts"] = client.infer("films", inputs, outputs=outputs).as_numpy("num_candidates").tolist()
    try:
        client.infer("films", inputs[:1])
    except Exception as error:  # noqa: BLE001 - each client has its own
        found[f"{protocol} error"] = str(error)
print(json.dumps(found))
