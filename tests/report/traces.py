"""Writes traces as a TPU's profiler does, with the fields of xplane.proto that xprof needs."""

import pathlib
from collections.abc import Sequence

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# name:number:type of each field, by message; * for repeated ones.
_MESSAGES = {
    "Stat": "metadata_id:1:int64 uint64_value:3:uint64 str_value:5:string",
    "Event": "metadata_id:1:int64 offset_ps:2:int64 duration_ps:3:int64 *stats:4:Stat",
    "Line": "id:1:int64 name:2:string *events:4:Event",
    "Metadata": "id:1:int64 name:2:string display_name:4:string *stats:5:Stat",
    "Entry": "key:1:int64 value:2:Metadata",
    "Plane": "id:1:int64 name:2:string *lines:3:Line *event_metadata:4:Entry "
    "*stat_metadata:5:Entry",
    "Space": "*planes:1:Plane",
}
_TYPES = {"int64": 3, "uint64": 4, "string": 9}
_MESSAGE = 11


def write(path: pathlib.Path, operations: Sequence[tuple[str, str, int]]) -> None:
    """Writes a trace of one TPU.

    Args:
      path: the file.
      operations: (name, category, microseconds) of each, one after the other.
    """
    space = _space_class()()
    plane = space.planes.add(id=1, name="/device:TPU:0")
    for number, name in enumerate(("hlo_category", "program_id", "symbol_id"), 1):
        plane.stat_metadata.add(key=number, value={"id": number, "name": name})
    line, offset = plane.lines.add(id=1, name="XLA Ops"), 1000
    for number, (name, category, microseconds) in enumerate(operations, 1):
        metadata = {
            "id": number,
            "name": f"%{name} = f32[8]{{0}} custom(f32[8]{{0}} %p)",
            "display_name": name,
            "stats": [
                {"metadata_id": 1, "str_value": category},
                {"metadata_id": 2, "uint64_value": 7},
                {"metadata_id": 3, "uint64_value": number},
            ],
        }
        plane.event_metadata.add(key=number, value=metadata)
        duration = microseconds * 10**6
        line.events.add(metadata_id=number, offset_ps=offset, duration_ps=duration)
        offset += duration + 1000
    path.write_bytes(space.SerializeToString())


def _space_class():
    file = descriptor_pb2.FileDescriptorProto(name="trace", package="trace", syntax="proto3")
    for message, fields in _MESSAGES.items():
        descriptor = file.message_type.add(name=message)
        for field in fields.split():
            name, number, kind = field.lstrip("*").split(":")
            descriptor.field.add(
                name=name,
                number=int(number),
                label=3 if field.startswith("*") else 1,
                type=_TYPES.get(kind, _MESSAGE),
                type_name=None if kind in _TYPES else f".trace.{kind}",
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("trace.Space"))
