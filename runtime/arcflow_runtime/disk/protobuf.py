"""Make protobuf classes for part of a format: tables of messages and fields -> a class that parses such messages.

protobuf itself parses the bytes, and skips the fields that the tables leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

#: Kinds of fields beside messages: one string of bytes, several, an int32 and an int64. Numbers are declared repeated,
#: so that their absence shows; messages too, because protobuf would merge a second value into the first.
BYTES, TEXTS, NUMBER, SIZE = "bytes", "texts", "number", "size"
_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    BYTES: (_FIELD.TYPE_BYTES, _FIELD.LABEL_OPTIONAL),
    TEXTS: (_FIELD.TYPE_BYTES, _FIELD.LABEL_REPEATED),
    NUMBER: (_FIELD.TYPE_INT32, _FIELD.LABEL_REPEATED),
    SIZE: (_FIELD.TYPE_INT64, _FIELD.LABEL_REPEATED),
}

#: Message -> its fields by name, each with its number and its kind or message.
Messages = Mapping[str, Mapping[str, tuple[int, str]]]


def message_class(package: str, messages: Messages, name: str) -> Any:
    """The protobuf class of the message `name`. Its own descriptor pool avoids a clash with the onnx package's."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for message_name, fields in messages.items():
        message = file.message_type.add(name=message_name)
        for field, (number, kind) in fields.items():
            if kind in _TYPES:
                type_, label = _TYPES[kind]
                message.field.add(name=field, number=number, type=type_, label=label)
            else:
                type_name, repeated = f".{package}.{kind}", _FIELD.LABEL_REPEATED
                message.field.add(
                    name=field, number=number, type=_FIELD.TYPE_MESSAGE, label=repeated, type_name=type_name
                )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
