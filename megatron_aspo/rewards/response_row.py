"""A response with its ground truth, from a line of a file or a request to a grading server."""

from typing import Any

from megatron_aspo.data.records import Prompt


class ResponseRow:
    """One response to grade."""

    def __init__(self, fields: dict[str, Any], number: int):
        """fields: those of the line or request. number: its position, which becomes the prompt's id.

        Raises ValueError naming the field that is missing or has the wrong type.
        """
        for name, kinds in (("response", str), ("data_source", str), ("extra", dict), ("prompt", str | list)):
            if name in fields and not isinstance(fields[name], kinds):
                raise ValueError(f"{name} is a {type(fields[name]).__name__}, expected {'text' if kinds is str else name}")
        for name in ("response", "ground_truth", "data_source"):
            if name not in fields:
                raise ValueError(f"the field {name} is missing; add it")
        prompt = fields.get("prompt", "")
        if isinstance(prompt, list):
            prompt = prompt[-1].get("content", "") if prompt and isinstance(prompt[-1], dict) else ""
            if not isinstance(prompt, str):
                raise ValueError(f"the content of the last message is a {type(prompt).__name__}, expected text")
        extra = {"data_source": fields["data_source"]} | fields.get("extra", {})  # as in a row of a run
        self.response: str = fields["response"]
        self.data_source: str = fields["data_source"]
        self.prompt = Prompt(str(number), (), prompt, fields["ground_truth"], self.data_source, extra, number)
