"""What each device has of a model: which heads, MLP columns, vocabulary rows, and which part of an adapter.

Megatron's layout for the base (arXiv 1909.08053): q, k, v, gate, up by columns, o and down by rows. What does not
divide is filled up with zeros, which change no result: heads that are all zero, MLP columns, rows of the vocabulary.
"""

import dataclasses
import functools
from typing import Literal

from jaxtyping import Int
import numpy as np

from pallas_kernels.geometry import GROUPS, Geometry, ceil_div

LoraLayout = Literal["s-lora", "comm-free"]

ROW_GROUPS = ("o", "down")
"""Groups whose input is split and whose output is a sum over the devices. The others are split by columns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One model over `devices` devices. Hashable; nothing in it depends on which devices they are.

    geometry: of the whole model. lora: layout of the adapters for each group, in the order of GROUPS.
    Index arrays have one row a device: the elements of the whole axis that the device holds, -1 for zeros.
    """

    devices: int
    geometry: Geometry
    vocab_size: int
    lora: tuple[LoraLayout, ...]

    def __post_init__(self):
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1, not {self.devices}")
        if len(self.lora) != len(GROUPS) or set(self.lora) - {"s-lora", "comm-free"}:
            raise ValueError(f"lora must name 's-lora' or 'comm-free' for each of {tuple(GROUPS)}, not {self.lora}")

    def lora_layout(self, group: str) -> LoraLayout:
        return self.lora[list(GROUPS).index(group)]

    @functools.cached_property
    def kv_heads(self) -> Int[np.ndarray, "N K"]:
        """KV heads of each device. Where there are fewer than devices, several devices have the same one."""
        heads = self.geometry.num_kv_heads
        if heads >= self.devices:
            return _runs(heads, self.devices)
        copies = self.devices // heads
        device = np.arange(self.devices)
        return np.where(device < heads * copies, device // copies, -1)[:, None]

    @functools.cached_property
    def q_heads(self) -> Int[np.ndarray, "N Q"]:
        """Query heads of each device, those of one KV head next to each other."""
        heads = self.geometry.num_kv_heads
        group = self.geometry.num_heads // heads
        copies = max(1, self.devices // heads)
        share = ceil_div(group, copies)
        part = np.arange(self.devices)[:, None, None] % copies * share + np.arange(share)
        kv = self.kv_heads[:, :, None]
        return np.where((kv >= 0) & (part < group), kv * group + part, -1).reshape(self.devices, -1)

    @functools.cached_property
    def q(self) -> Int[np.ndarray, "N q"]:
        """Outputs of q_proj, which are the inputs of o_proj."""
        return _elements(self.q_heads, self.geometry.head_dim)

    @functools.cached_property
    def kv(self) -> Int[np.ndarray, "N kv"]:
        """Outputs of k_proj and of v_proj."""
        return _elements(self.kv_heads, self.geometry.head_dim)

    @functools.cached_property
    def mlp(self) -> Int[np.ndarray, "N F"]:
        """Outputs of gate_proj and up_proj, inputs of down_proj."""
        return _runs(self.geometry.in_sizes[6], self.devices)

    @functools.cached_property
    def vocab(self) -> Int[np.ndarray, "N V"]:
        """Rows of the embedding and of lm_head."""
        return _runs(self.vocab_size, self.devices)

    @functools.cached_property
    def hidden(self) -> Int[np.ndarray, "N H"]:
        """The slice of the hidden state that each device's B covers in a row group in S-LoRA's layout."""
        return _runs(self.geometry.in_sizes[0], self.devices)

    @functools.cached_property
    def whole(self) -> Int[np.ndarray, "N H"]:
        """The whole hidden state on every device."""
        return np.broadcast_to(np.arange(self.geometry.in_sizes[0]), (self.devices, self.geometry.in_sizes[0]))

    def columns(self, axis: str, parts: int = 1) -> Int[np.ndarray, "N n"]:
        """Index array of a parameter's logical axis. parts: projections side by side on it (q|k|v or gate|up)."""
        size = self.geometry.out_sizes
        fused: dict[tuple[str, int], list[tuple[np.ndarray, int]]] = {
            ("vocab", 1): [(self.vocab, self.vocab_size)],
            ("heads", 1): [(self.q, size[0])],
            ("heads", 3): [(self.q, size[0]), (self.kv, size[1]), (self.kv, size[2])],
            ("mlp", 1): [(self.mlp, size[4])],
            ("mlp", 2): [(self.mlp, size[4]), (self.mlp, size[5])],
        }
        found, start = [], 0
        for index, width in fused[axis, parts]:
            found.append(np.where(index >= 0, index + start, -1))
            start += width
        return np.concatenate(found, axis=1)

    def inputs(self, module: int) -> Int[np.ndarray, "N n"]:
        """Inputs of one of MODULES that each device has."""
        return {3: self.q, 6: self.mlp}.get(module, self.whole)

    def outputs(self, module: int) -> Int[np.ndarray, "N n"]:
        """Outputs of one of MODULES that each device's part of an adapter's B covers."""
        column = {0: self.q, 1: self.kv, 2: self.kv, 4: self.mlp, 5: self.mlp}
        if module in column:
            return column[module]
        group = next(g for g, modules in GROUPS.items() if module in modules)
        return self.hidden if self.lora_layout(group) == "s-lora" else self.whole

    @functools.cached_property
    def local(self) -> Geometry:
        """One device's part of the model, and of the page pool."""
        return self._geometry(self._widths(self.inputs), self._widths(self.outputs))

    @functools.cached_property
    def shrink(self) -> Geometry:
        """For lora_shrink: a device's image has all its tiles of A before those of B, so B takes no room in a layer."""
        return self._geometry(self._widths(self.inputs), (0,) * 7)

    @functools.cached_property
    def expand(self) -> Geometry:
        """For lora_expand: the same for the run of B."""
        return self._geometry((0,) * 7, self._widths(self.outputs))

    def _widths(self, index) -> tuple[int, ...]:
        return tuple(index(module).shape[1] for module in range(7))

    def _geometry(self, in_sizes: tuple[int, ...], out_sizes: tuple[int, ...]) -> Geometry:
        return dataclasses.replace(
            self.geometry,
            num_heads=self.q_heads.shape[1],
            num_kv_heads=self.kv_heads.shape[1],
            in_sizes=in_sizes,
            out_sizes=out_sizes,
        )


def _runs(size: int, devices: int) -> Int[np.ndarray, "N n"]:
    """Consecutive runs of the same length, the last ones filled up with -1."""
    index = np.arange(devices * ceil_div(size, devices)).reshape(devices, -1)
    return np.where(index < size, index, -1)


def _elements(heads: Int[np.ndarray, "N h"], head_dim: int) -> Int[np.ndarray, "N n"]:
    index = heads[:, :, None] * head_dim + np.arange(head_dim)
    return np.where(heads[:, :, None] >= 0, index, -1).reshape(len(heads), -1)
