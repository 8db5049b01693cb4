"""The cached sampler of `models.pixelcnn`: an image in H·W ticks, a pixel each.

The vertical features of an image row depend on the rows above only: they are computed for a whole row when its first
pixel is due, from the last rows that every layer keeps, and so is all that they tell the horizontal stack. What remains
of a pixel is one column of the horizontal stack, whose taps to the left are known beforehand as well: one product for
all layers. Only the taps at the pixel itself are taken layer by layer. This last part is a hundred small products, and
stands in C as well (`_pixelcnn.c`), where calling them costs nothing.

    B    rows: chains, images            E    numbers that stand for a level     L    layers; layer l has dilation d_l
    C    channels of the image, H × W    F    features                           M    columns of margin, of zeros
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from models import _native, _random
from models._protocol import Draw, Rows

if TYPE_CHECKING:
    from models.pixelcnn import Network

# A matrix library may take products of very few columns in another order of summation (MKL does for fewer than four):
# with fewer chains copies of the last fill up, so that a chain's logits are the same bits alone and in a crowd.
FEWEST = 4


@dataclass
class PixelRows(Rows):
    """Images half drawn, and the caches of both stacks. A tick draws one pixel, all of its channels."""

    label: Tensor  # (B,)
    added: Tensor  # (B, 2F): by the label, to the inputs of the stacks
    temperature: Tensor  # (B, 1) float64
    uniforms: Tensor  # (B, H·W, C) float64: all the randomness of the image
    levels: Tensor  # (B, H·W, C)
    # of the image rows above: vertical features, (B, Σ (d_l + 1), M + W + M, F). In layer l's ring those of image row i
    # are at i mod (d_l + 1), so that no row writes where it reads, and a tick can be taken again
    above: Tensor
    # of the image row that is being drawn, by column
    told: Tensor  # (B, M + W, F + L·2F): from above, to the horizontal stack's input and to its gates
    pixels: Tensor  # (B, M + W, C·E): embedded
    past: Tensor  # (B, M + W, L·F): what entered each layer of the horizontal stack


class Sampler(_native.Addressed):
    """A network as sampling takes it: matrices (inputs, outputs), of each layer and of each channel.

    All are views of the network's weights, made once, since making them takes as long as a third of a tick: what is
    written into the weights shows, but not weights that have moved (`is_of`).
    """

    def __init__(self, net: Network) -> None:
        super().__init__(net)
        self.height, self.width, _ = net.place.shape
        self.channels, self.reach, self.dilations = len(net.heads), net.reach, net.dilations
        self.margin = max(net.reach, *net.dilations)
        with torch.no_grad():
            self._show(net)
            self._lay_out(net.place.device)
            self._address(net)

    def _show(self, net: Network) -> None:
        """The weights."""
        self.embed, self.by_label, self.place = net.embed, net.by_label, net.place.detach()
        self.look_up, self.look_left = net.look_up.mT, net.look_left.mT
        self.up, self.across, self.vertical_bias = net.up.mT, net.across.mT.unbind(), net.vertical_bias[:, None]
        self.down, self.horizontal_bias = net.down.mT, net.horizontal_bias[:, None]
        self.past, self.now, self.out = net.past.mT, net.now.mT.unbind(), net.out.mT.unbind()
        self.heads = [tuple(part.detach() for part in head.tensors()) for head in net.heads]
        self.tables = net.table.view(self.channels, -1, net.table.shape[1]).unbind()  # (levels, E)

    def _lay_out(self, device: torch.device) -> None:
        """Where things lie in `PixelRows`. For each image row: the rows that the vertical stack's input sees, and each
        layer's place in its ring a dilation above and in the row itself. For each column: what a window sees, and, in
        the row that is being drawn, the features a dilation to the left.
        """
        i, j = torch.arange(self.height, device=device), torch.arange(self.width, device=device)
        n, d = len(self.dilations), torch.tensor(self.dilations, device=device)
        near = i[:, None] + torch.arange(-self.reach, 0, device=device)
        ring = ((d + 1).cumsum(0) - (d + 1))[:, None]
        self.near, self.is_near = near.clamp(min=0), (near >= 0)[:, :, None, None]  # (H, REACH), and (H, REACH, 1, 1)
        self.before, self.here = ring + (i - d[:, None]) % (d[:, None] + 1), ring + i % (d[:, None] + 1)  # (L, H)
        window = d[:, None, None] * torch.arange(-1, 2, device=device)
        self.window = (self.margin + j[:, None] + window)[:, None]  # (L, 1, W, 3)
        columns = torch.arange(self.margin + self.width, device=device)
        behind = torch.arange(n, device=device) - n * d + n * columns[:, None]
        self.behind = behind.unbind()  # of each column, (L,)
        self.behind_alone = behind.repeat_interleave(FEWEST, dim=1).unbind()  # of a single chain, which fills up

    def _address(self, net: Network) -> None:
        """As `_pixelcnn.c` takes it: what its Shape and its Tensors begin with."""
        d = torch.tensor(self.dilations, device=self.place.device)
        heads = [part for head in self.heads for part in head]
        weights = self.look_left, self.past, net.now.mT, net.out.mT, net.table
        self.can_be_in_c = _native.usable(d, *heads, *weights)
        hidden, levels = self.heads[0][2].shape
        sizes = self.past.shape[1], len(d), net.table.shape[1], self.channels, hidden, levels
        columns = self.margin + self.width
        self.shape_in_c = *sizes, self.reach, self.width, self.height, columns, self.margin
        self.kept = d, _native.addresses(*heads)
        addresses = *(w.data_ptr() for w in weights), ctypes.addressof(self.kept[1]), d.data_ptr()
        self.addresses_in_c: tuple[int, ...] = addresses

    def init(self, draws: Sequence[Draw]) -> PixelRows:
        b, c, device, columns = len(draws), self.channels, self.place.device, self.margin + self.width
        (n, f, _), pixels = self.past.shape, self.height * self.width
        seed = _random.seed_bits([draw.seed for draw in draws], device)
        sample = torch.tensor([draw.sample for draw in draws], device=device)
        temperature = torch.tensor([draw.temperature for draw in draws], dtype=torch.float64, device=device)
        label = torch.tensor([draw.label for draw in draws], device=device)
        return PixelRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.full((b,), pixels, device=device),
            label=label,
            added=self.by_label(label),
            temperature=temperature[:, None],
            uniforms=_random.uniform(seed, sample, 0, 0, (pixels, c)).double().contiguous(),
            levels=torch.zeros(b, pixels, c, dtype=torch.int64, device=device),
            above=torch.zeros(b, sum(self.dilations) + n, columns + self.margin, f, device=device),
            told=torch.zeros(b, columns, f + n * 2 * f, device=device),
            pixels=torch.zeros(b, columns, c * self.tables[0].shape[1], device=device),
            past=torch.zeros(b, columns, n * f, device=device),
        )

    def step(self, rows: PixelRows) -> PixelRows:
        """Draw the next pixel of every image, wherever it is."""
        ticks = rows.tick.tolist()
        first = [chain for chain, tick in enumerate(ticks) if tick % self.width == 0]
        if first:
            self._begin_row(rows, torch.tensor(first, device=rows.tick.device))
        if not self._tick_in_c(rows):
            self._tick(rows, ticks)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def _begin_row(self, rows: PixelRows, at: Tensor) -> None:
        """The vertical stack over an image row, for the chains `at`, which are about to draw its first pixel."""
        b, height, width, margin = len(at), self.height, self.width, self.margin
        n, f, _ = self.past.shape
        i = rows.tick.index_select(0, at) // width
        base = self.place.index_select(0, i) + rows.added.index_select(0, at)[:, None]  # (b, W, 2F)

        near = (at[:, None] * height + self.near.index_select(0, i)).flatten()  # image rows that the input sees
        seen = self.embed(rows.levels.view(len(rows.tick) * height, width, -1).index_select(0, near))
        seen = seen.view(b, self.reach, width, -1) * self.is_near.index_select(0, i)
        padded = seen.new_zeros(b, margin + width + margin, self.reach, seen.shape[3])
        padded.narrow(1, margin, width).copy_(seen.transpose(1, 2))
        seen = _windows(padded.flatten(2), width, 2 * self.reach + 1, 1)
        v = torch.addmm(base[..., :f].flatten(0, 1), seen, self.look_up)  # (b·W, F)

        rings = at * rows.above.shape[1]  # in `above`, its dims 0 and 1 taken as one
        upper = (self.before.index_select(1, i) + rings)[:, :, None, None] * rows.above.shape[2] + self.window
        seen = rows.above.view(-1, f).index_select(0, upper.flatten()).view(n, b * width, 3 * f)
        gates = torch.baddbmm(self.vertical_bias, seen, self.up)  # (L, b·W, 2F)
        entering = v.new_zeros(n + 1, b, margin + width + margin, f)  # each layer, and what leaves the last
        inner = entering.narrow(2, margin, width)
        inner[0] = v.view(b, width, f)
        after = inner[1:]
        layers = zip(gates.unbind(), self.across, self.dilations, entering[:n].unbind(), after.unbind(), strict=True)
        for u, across, d, entered, v in layers:
            u.addmm_(_windows(entered, width, 3, d), across)
            torch.add(entered.narrow(1, margin, width), F.glu(u, dim=1).view_as(v), out=v)
        here = (self.here.index_select(1, i) + rings).flatten()
        rows.above.flatten(0, 1).index_copy_(0, here, entering[:n].flatten(0, 1))

        gates = torch.baddbmm(self.horizontal_bias, after.reshape(n, b * width, f), self.down)
        whole = rows.told.narrow(1, margin, width)
        told = whole if b == len(rows.tick) else torch.empty_like(whole[:b])
        told.narrow(2, 0, f).copy_(base[..., f:])
        told[..., f:].view(b, width, n, 2 * f).copy_(gates.view(n, b, width, 2 * f).permute(1, 2, 0, 3))
        if b < len(rows.tick):
            whole.index_copy_(0, at, told)

    def _tick_in_c(self, rows: PixelRows) -> bool:
        """What remains of a tick, as `_tick`, in C; whether that could be done. Raises `FloatingPointError`."""
        native = _native.library("pixelcnn")
        caches = rows.tick, rows.temperature, rows.uniforms, rows.told, rows.pixels, rows.past, rows.levels
        if native is None or not self.can_be_in_c or not _native.usable(*caches):
            return False
        shape = (*self.shape_in_c, len(rows.tick))
        addresses = (*self.addresses_in_c, *(part.data_ptr() for part in caches))
        failed = native.tick((ctypes.c_int64 * len(shape))(*shape), (ctypes.c_void_p * len(addresses))(*addresses))
        if failed < 0:
            raise MemoryError("no memory for a tick")
        if failed:
            raise FloatingPointError(f"row {failed - 1}: the logits of a pixel are not numbers")
        return True

    def _tick(self, rows: PixelRows, ticks: list[int]) -> None:
        """What remains of a tick when the vertical stack has told what it knows: one column of the horizontal one."""
        n, f, _ = self.past.shape
        b, columns, e = rows.pixels.shape
        together = ticks.count(ticks[0]) == b  # as after a request for several images: then a slice does for a gather
        if together:
            at = self.margin + ticks[0] % self.width
            told = rows.told.select(1, at)
            nearest = rows.pixels.narrow(1, at - self.reach, self.reach)
            uniforms = rows.uniforms.select(1, ticks[0])
        else:
            chain = torch.arange(b, device=rows.tick.device)
            here = chain * columns + self.margin + rows.tick % self.width  # in the caches, dims 0 and 1 taken as one
            pixel = chain * rows.levels.shape[1] + rows.tick
            told = rows.told.view(b * columns, -1).index_select(0, here)
            near = here[:, None] + torch.arange(-self.reach, 0, device=here.device)
            nearest = rows.pixels.view(-1, e).index_select(0, near.flatten())
            uniforms = rows.uniforms.view(-1, self.channels).index_select(0, pixel)
        if b == 1:
            behind = rows.past.view(-1, f).index_select(0, self.behind_alone[at]).view(n, FEWEST, f)
        elif together:
            behind = _fill(rows.past.view(b, -1, f).index_select(1, self.behind[at])).transpose(0, 1)
        else:
            behind = rows.past.view(-1, f).index_select(0, (here[:, None] * n + self.behind[0]).flatten())
            behind = _fill(behind.view(b, n, f)).transpose(0, 1)

        told = told if b == 1 else _fill(told)  # in a sum a single row is as good as many
        h = torch.addmm(told.narrow(1, 0, f), _fill(nearest.reshape(b, self.reach * e)), self.look_left)  # (B, F)
        above = told.narrow(1, f, n * 2 * f).view(-1, n, 2 * f)
        gates = torch.baddbmm(above.transpose(0, 1), behind.contiguous(), self.past)  # (L, B, 2F)
        entered = []
        for u, now, out in zip(gates.unbind(), self.now, self.out, strict=True):
            entered.append(h)
            h = torch.addmm(h, F.glu(u.addmm_(h, now), dim=1), out)
        past = torch.cat(entered, dim=1)[:b]
        levels, embedded = self._draw_pixel(h, uniforms, rows.temperature)

        if together:
            rows.past.select(1, at).copy_(past)
            rows.pixels.select(1, at).copy_(embedded)
            rows.levels.select(1, ticks[0]).copy_(levels)
        else:
            rows.past.view(b * columns, -1).index_copy_(0, here, past)
            rows.pixels.view(-1, e).index_copy_(0, here, embedded)
            rows.levels.view(-1, self.channels).index_copy_(0, pixel, levels)

    def _draw_pixel(self, known: Tensor, uniforms: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Channel by channel, from features (≥ B, F): levels (B, C) and what stands for them (B, C·E)."""
        levels: list[Tensor] = []
        embedded: list[Tensor] = []
        for c, (first, first_bias, last, last_bias) in enumerate(self.heads):
            if c:
                known = torch.cat([known, _fill(embedded[-1])], dim=1)
            logits = torch.addmm(last_bias, torch.addmm(first_bias, known, first).relu_(), last)
            level = draw(logits[: len(uniforms)], uniforms.narrow(1, c, 1), temperature)
            levels.append(level)
            embedded.append(self.tables[c].index_select(0, level.view(-1)))
        return (levels[0], embedded[0]) if c == 0 else (torch.cat(levels, dim=1), torch.cat(embedded, dim=1))


def draw(logits: Tensor, uniforms: Tensor, temperature: Tensor) -> Tensor:
    """Levels (B, K) from the softmax of logits (B, levels) / temperature (B, 1): the quantiles at uniforms (B, K).

    Uniforms and temperature are float64, the uniforms midpoints on (0, 1) of float32's steps. In float64 the
    distribution function is monotone and ends above any of them: the level is always in range and possible.

    Logits that differ in their last bits give another level only where a uniform falls between the two values of the
    distribution function. Between the cached and the naive sampler, whose sums have another order, that befell five of
    a million pixels (float32, a trained model of 28×28 images). Between a chain alone and the same in a crowd it can be
    only where the device's matrix library lets a row of a product depend on how many there are: see FEWEST.
    """
    cumulative = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulative, uniforms.contiguous(), right=True)


def _windows(padded: Tensor, width: int, taps: int, dilation: int) -> Tensor:
    """(B, M + W + M, K), its margins zero -> (B·W, taps·K): what a centred window of so many columns sees at each."""
    b, columns, k = padded.shape
    left = (columns - width) // 2 - dilation * (taps // 2)
    strides = (columns * k, k, dilation * k, 1)
    return padded.as_strided((b, width, taps, k), strides, padded.storage_offset() + left * k).reshape(-1, taps * k)


def _fill(part: Tensor) -> Tensor:
    """(b, ...) -> (≥ FEWEST, ...): the last row repeated."""
    missing = FEWEST - len(part)
    if missing <= 0:
        return part
    shape = part.shape[1:]
    return part.expand(FEWEST, *shape) if len(part) == 1 else torch.cat([part, part[-1:].expand(missing, *shape)])
