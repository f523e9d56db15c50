"""Bundles as the control plane takes them: of the right base, and described for the workers.

Knows nothing of Ray.
"""

from __future__ import annotations

from configs.schema import BaseConfig, ServingConfig
from expert_trainer.base import base_digest
from expert_trainer.bundle import Bundle
from server.engine import Adapter, accepted_rank, check_engine_args
from server.errors import ServingConfigError
from server.orders import Deployment, ServedExpert


def check_base(bundle: Bundle, base: BaseConfig) -> None:
    """See that the base is the one that the bundle's experts belong to.

    Raises:
        BaseModelError: it is not there.
        ServingConfigError: it is another.
    """
    if base_digest(base) != bundle.manifest.base.digest:
        raise ServingConfigError(
            f"base.model {base.model} is not what the experts of {bundle.place} were trained on "
            f"({bundle.manifest.base.model}); set base.model to that, or train again"
        )


def describe(
    bundle: Bundle, serving: ServingConfig, base: BaseConfig, *, place: str = ""
) -> Deployment:
    """What of a bundle is to be served.

    Args:
        bundle: it.
        serving: how.
        base: its base, resolved.
        place: its directory or URL as the gateways are told; empty: as configured.

    Raises:
        ServingConfigError: engine arguments or ranks that no engine takes.
        DamagedBundleError: a card cannot be read.
    """
    check_engine_args(serving)
    experts, served = [], bundle.manifest.served
    for entry, card in zip(served, bundle.cards(served), strict=True):
        accepted_rank(entry.rank)
        adapter = Adapter(
            served_name=entry.served_name,
            path=str(bundle.place_of(entry).resolve()),
            rank=entry.rank,
            fingerprint=card.fingerprint,
            source=bundle.expert(entry),
        )
        experts.append(ServedExpert(entry.id, entry.version, entry.cluster, entry.mass, adapter))
    return Deployment(
        bundle=bundle.manifest.version,
        base_name=base.served_name,
        experts=tuple(experts),
        place=place,
    )
