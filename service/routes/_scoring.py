"""What routes that score images share: which model is asked, and the images that it is asked about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service import errors, images
from service.errors import Fault
from service.images import off_loop
from service.messages import Pixels
from service.routes._services import Services
from service.schemas import ImageShape
from service.scoring import Scorer

_DECODED_FAR_FROM_LOOP = 2**31  # whatever the model's size: images that are resized may be as large as the limit


async def scorer_of(model: str, services: Services, loc: tuple[str | int, ...] = ("body", "model")) -> Scorer:
    """A model's version in service and its likelihood. loc: where the request names the model. Raises `NoDensity` where
    it has none."""
    entry, version = await services.model(model, loc)
    if version.spec.likelihood is None:
        pool = await services.broker.pool()
        able = [
            e.id
            for e in services.catalog.entries(pool)
            if e.status != "failed" and e.version and e.version.spec.likelihood
        ]
        raise errors.NoDensity(entry.id, version.spec.family, able, loc)
    return Scorer(entry.id, version, version.spec.likelihood)


async def decoded(
    files: Sequence[str | bytes], shape: ImageShape, resize: bool | None, max_side: int
) -> tuple[Pixels, list[int]]:
    """Files -> pixels (N, C, H, W), and which of them were resized. resize: None where a request cannot ask for it.
    Raises `Invalid`, naming each that is refused."""

    def work() -> tuple[list[Pixels], list[int], list[Fault]]:
        found, resized, faults = [], [], []
        for k, file in enumerate(files):
            try:
                data = images.from_base64(file) if isinstance(file, str) else file
                image = images.decode(data, shape, resize=bool(resize), max_side=max_side)
            except images.ImageRefused as e:
                way_out = resize is not None and isinstance(e, images.OtherShape)
                told = f'{e} ("resize": true brings it there)' if way_out else str(e)
                faults.append(Fault(("body", "images", k), told, file if isinstance(file, str) else None))
                continue
            found.append(image.pixels)
            if image.resized:
                resized.append(k)
        return found, resized, faults

    cost = _DECODED_FAR_FROM_LOOP if resize else len(files) * shape.width * shape.height * shape.channels
    found, resized, faults = await off_loop(cost, work)
    if faults:
        raise errors.Invalid(*faults)
    return np.stack(found), resized
