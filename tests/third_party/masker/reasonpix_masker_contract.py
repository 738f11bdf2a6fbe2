"""What every masker must satisfy."""

from __future__ import annotations

from reasonpix.plugin import Box, Problem
from reasonpix.plugin.testing import ComponentContract, photographs


class MaskerContract(ComponentContract):
    """Subclass it and set `component`."""

    def test_masks_match_images(self) -> None:
        images = photographs()
        boxes = [
            (Box(x0=1, y0=2, x1=w - 1, y1=h - 2, width=w, height=h),)
            for w, h in (image.size for image in images)
        ]
        masks = self.subject.mask(images, boxes)
        assert len(masks) == len(images)
        for image, mask in zip(images, masks, strict=True):
            if not isinstance(mask, Problem):
                assert (mask.mode, mask.size) == ("L", image.size)
                assert mask.getextrema()[1] <= 1
