"""The hub that downloads are tested with."""

from tests.hub.fake_hub import hub, hub_model

__all__ = ["hub", "hub_model"]
