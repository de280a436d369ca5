"""Writes api.md from the comments of proto/deltaserve/v1: ``python docs/api_reference.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

DOCS = Path(__file__).parent
PROTO = DOCS.parent / "proto"
PACKAGE = ".deltaserve.v1."
# their numbers in FileDescriptorProto, DescriptorProto, EnumDescriptorProto and so on, by which
# the places of comments are given
MESSAGE, ENUM, SERVICE = 4, 5, 6
PART = 2

HEAD = """# API

Written by `python docs/api_reference.py` from the comments in
[proto/deltaserve/v1](../proto/deltaserve/v1). The package is `deltaserve.v1`. Every field may be
left out unless its text says otherwise. `optional` tells a field that is not set from one that is
0 or empty; of the fields marked *one of*, only one can be set. Errors are gRPC statuses with
`google.rpc.ErrorInfo` (domain `deltaserve`), `BadRequest` where a field is at fault, and
`RetryInfo` where it helps to try again. Clients of TGIS find their service in [tgis.md](tgis.md),
clients of OpenAI's API theirs in [http.md](http.md)."""


def described() -> list[FileDescriptorProto]:
    """The protos, with their comments."""
    files = sorted(PROTO.glob("deltaserve/v1/*.proto"))
    include = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        given = [f"-I{PROTO}", f"-I{include}", f"--descriptor_set_out={out}"]
        code = protoc.main(["protoc", *given, "--include_source_info", *map(str, files)])
        if code:
            raise SystemExit(code)
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


class Comments:
    """The comment before each thing of a file, by its path in the descriptor."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._found = {
            tuple(place.path): place.leading_comments for place in file.source_code_info.location
        }

    def __call__(self, *path: int) -> str:
        """On one line, as a cell of a table."""
        return " ".join(self._found.get(path, "").split()).replace("|", "\\|")


def page() -> str:
    """api.md."""
    files = described()
    parts = [HEAD, "\n".join(_contents(files))]
    for file in files:
        comments = Comments(file)
        for i, service in enumerate(file.service):
            parts += _service(service, comments, i)
        for i, message in enumerate(file.message_type):
            parts += _message(message, comments, i)
        for i, enum in enumerate(file.enum_type):
            parts += _enum(enum, comments, i)
    return "\n\n".join(parts) + "\n"


def _contents(files: Sequence[FileDescriptorProto]) -> Iterator[str]:
    for file in files:
        for service in file.service:
            calls = ", ".join(
                f"[{m.name}](#{m.input_type.rpartition('.')[2].lower()})" for m in service.method
            )
            yield f"- [{service.name}](#{service.name.lower()}): {calls}"


def _service(service: ServiceDescriptorProto, comments: Comments, i: int) -> list[str]:
    rows = [
        f"| `{m.name}` | {_named(m.input_type)} | {'stream of ' * m.server_streaming}"
        f"{_named(m.output_type)} | {comments(SERVICE, i, PART, j)} |"
        for j, m in enumerate(service.method)
    ]
    return [
        f"## {service.name}",
        comments(SERVICE, i),
        "\n".join(["| method | takes | gives | |", "|---|---|---|---|", *rows]),
    ]


def _message(message: DescriptorProto, comments: Comments, i: int) -> list[str]:
    parts = [f"### {message.name}", comments(MESSAGE, i)]
    rows = [
        f"| `{field.name}` | {_type(field, message)} | {comments(MESSAGE, i, PART, j)} |"
        for j, field in enumerate(message.field)
    ]
    if rows:
        parts.append("\n".join(["| field | type | |", "|---|---|---|", *rows]))
    return parts


def _enum(enum: EnumDescriptorProto, comments: Comments, i: int) -> list[str]:
    rows = [
        f"| `{value.name}` | {comments(ENUM, i, PART, j)} |" for j, value in enumerate(enum.value)
    ]
    return [
        f"### {enum.name}",
        comments(ENUM, i),
        "\n".join(["| value | |", "|---|---|", *rows]),
    ]


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{message.name}.{nested.name}"):
            key, value = nested.field
            return f"map of {_plain(key)} to {_plain(value)}"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {_plain(field)}"
    if field.proto3_optional:
        return f"optional {_plain(field)}"
    if field.HasField("oneof_index"):
        return f"{_plain(field)}, *one of {message.oneof_decl[field.oneof_index].name}*"
    return _plain(field)


def _plain(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _named(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _named(path: str) -> str:
    name = path.removeprefix(PACKAGE)
    return f"[{name}](#{name.lower()})" if path.startswith(PACKAGE) else f"`{path[1:]}`"


if __name__ == "__main__":
    (DOCS / "api.md").write_text(page())
