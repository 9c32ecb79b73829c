"""The parts of an assistant's answer, read from its text as it comes: reasoning, content, tool calls.

Owns: the formats in which model families write calls and reasoning. Leaves to others: prompts (workers/text), the shape
of answers over HTTP (controller/gateway/api). Standard library only.

Every reader gives the same parts however the text is split, takes time linear in its length, and never fails: what is
not a call is content.

Tested elsewhere: json_object, json_call, marks, state_reader in test_json_calls.py; parts in test_message.py;
call_syntax in test_tool_formats.py.
"""
