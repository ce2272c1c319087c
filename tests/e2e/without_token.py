"""A client without the token, run on a host: which of Ray's servers answer it? Arguments: address, then ports; prints JSON, port → answer.

With the token in the variable TOKEN it sends the token, which shows that the answer depends on it.
"""

import http.client
import json
import os
import sys

import grpc

METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
    "ReporterService/GetTraceback",
    "RayletDriver/ClusterInfo",
)
"""One method of each of Ray's gRPC services; a server has one of them."""
PATHS = (("POST", "/get_or_create_runtime_env"), ("GET", "/api/job_agent/jobs/"), ("GET", "/metrics"), ("GET", "/api/version"))
"""One path of each of its HTTP servers."""
TOKEN = os.environ.get("TOKEN", "")


def grpc_answers(address: str) -> set[str]:
    metadata = [("authorization", f"Bearer {TOKEN}")] if TOKEN else []
    found = set()
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=3, metadata=metadata)
                found.add("OK")
            except grpc.RpcError as error:
                found.add(error.code().name)
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):  # it speaks another protocol
                    break
    return found - {"UNIMPLEMENTED"}


def http_answers(host: str, port: int) -> set[str]:
    headers = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
    found = set()
    for verb, path in PATHS:
        connection = http.client.HTTPConnection(host, port, timeout=3)
        try:
            connection.request(verb, path, headers=headers)
            found.add(str(connection.getresponse().status))
        except (OSError, http.client.HTTPException):
            break
        finally:
            connection.close()
    return found - {"404", "405"}


def main() -> None:
    host, *ports = sys.argv[1:]
    print(json.dumps({port: sorted(http_answers(host, int(port)) or grpc_answers(f"{host}:{port}")) for port in ports}))


if __name__ == "__main__":
    main()
