"""The config's section `alerts`."""

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_validator

from distrib.config_section import Section

Alert: TypeAlias = Literal["failed", "nonfinite", "hung", "stopped", "finished", "preempted"]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class AlertsConfig(Section):
    """Messages to a webhook when one of `on` happens. The environment variable `url_from` holds the webhook's URL."""

    on: Annotated[tuple[Alert, ...], Field(strict=False, min_length=1)] = (
        *("failed", "nonfinite", "hung", "stopped", "finished"),
    )
    url_from: str = "DISTRIB_ALERTS_URL"

    @model_validator(mode="before")
    @classmethod
    def _without_url(cls, values: Any) -> Any:
        """Refuse a URL, and do not show it: it is a secret, and a config is not."""
        given = values if isinstance(values, dict) else {"url": values} if isinstance(values, str) else {}
        variable = given.get("url_from", "DISTRIB_ALERTS_URL")
        if "url" in given or (isinstance(variable, str) and not _VARIABLE.fullmatch(variable)):
            raise ValueError(
                "the webhook's URL is a secret, and a config is shown in the run folder and by trackers; put the URL "
                "into the environment variable DISTRIB_ALERTS_URL, or name another variable in alerts.url_from"
            )
        return values


def leave_out_none(self: BaseModel, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """Serialize a config, as a method of it. One without `alerts` or `init` is as before there were such sections."""
    values: dict[str, Any] = serialize(self)
    return {key: value for key, value in values.items() if key not in ("alerts", "init") or value is not None}
