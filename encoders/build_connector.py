"""Building a connector from its configuration, and initialising it."""

from dataclasses import replace
from typing import Any

from unimoe.errors import UserError

from .connector import Connector, ConnectorConfig, MLPConnector
from .frame_connector import FrameConnector
from .qformer import QFormerConnector
from .whisper_qformer import load_whisper_decoder


def build_connector(config: dict[str, Any], in_features: int, out_features: int) -> Connector:
    """Build the connector that ``config`` (a ConnectorConfig as a dictionary) describes, with random weights.

    ``in_features`` is the encoder's width, ``out_features`` the language model's.

    Raises:
        UserError: the configuration is invalid.
    """
    return connector_of(ConnectorConfig.parse(config), in_features, out_features)


def connector_of(config: ConnectorConfig, in_features: int, out_features: int) -> Connector:
    """The connector that a parsed ``config`` describes."""
    if config.time:
        frame = connector_of(replace(config, time=None), in_features, out_features)
        return FrameConnector(config, frame, out_features)
    if config.type == "qformer":
        return QFormerConnector(config, in_features, out_features)
    return MLPConnector(config, in_features, out_features)


def copy_connector(connector: Connector, source: Connector) -> None:
    """Copy the weights of ``source``; a connector over video frames takes those of an image connector.

    Raises:
        UserError: they differ in shape.
    """
    target = getattr(connector, "frame", connector)
    own, found = (
        {name: list(tensor.shape) for name, tensor in one.state_dict().items()} for one in (target, source)
    )
    if own != found:
        raise UserError(f"connector {connector.config.type}: weights have shapes {found}, expected {own}")
    target.load_state_dict(source.state_dict())


def fill_connector(connector: Connector, weights: str) -> None:
    """Give a fresh connector the weights that its configuration names: a Whisper decoder's, for a causal
    Q-Former (:func:`~.whisper_qformer.load_whisper_decoder`).

    Raises:
        UserError: the connector is no causal Q-Former, or the decoder does not fit.
    """
    if connector.config.type != "qformer" or not connector.config.causal:
        raise UserError(
            f"connector {connector.config.type}: weights belong to a causal qformer (a Whisper decoder's)"
        )
    load_whisper_decoder(connector, weights)  # type: ignore[arg-type]
