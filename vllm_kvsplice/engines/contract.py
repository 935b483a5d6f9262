"""What every engine implements, and the batch it works on. `reference` is the specification.

Names: T tokens of the step, S sequences, H KV heads, G query heads per KV head, D head dimensions, R2 = 2 * H * D
latents, W tokens of the exact window, pages uint8 [B blocks, C bytes per token, N tokens per block].
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_kvsplice.codec import LayerCodec

# Of the exact window. Quality and memory by window: docs/window.md.
DEFAULT_WINDOW = 32
MAX_WINDOW = 1 << 20
# Dimensions of a head that the engines `cpu` and `triton` take.
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Batch:
    """Which rows of a step belong to which sequence, and where its pages are. int32 tensors on the pages' device.

    Attributes:
        query_start: [S + 1], offsets of the sequences' queries in the step.
        seq_lens: [S], tokens stored of each sequence, this step's included; its queries are the last of them.
        block_table: [S, at least the blocks of the longest sequence]; entries past a sequence's end are stale.
        longest: at least the largest of `seq_lens`, where the host knows it without asking the device.

    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    longest: int | None = None


@dataclass(frozen=True)
class Window:
    """The newest tokens as they are. A query at position i reads j > i - W from here and everything older as stored.

    So what it reads depends on positions alone, not on how the sequence was cut into steps.

    Attributes:
        size: W, at least 1.
        pages: [B', H, N', 2 * D] in the model's dtype, a token's key before its value; blocks may lie any distance apart.
        block_table: int32 [S, blocks of the longest sequence]; only entries of blocks that a query reads are valid.
        whole_chunk: a query also reads its step's own tokens exactly, however many there are. Then what it reads does
            depend on the steps.

    """

    size: int
    pages: Tensor
    block_table: Tensor
    whole_chunk: bool = False


class Engine(Protocol):
    """Kernels over packed pages."""

    def write(
        self, codec: LayerCodec, key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, pages: Tensor
    ) -> None:
        """Encode a step's tokens into `pages`.

        Args:
            codec: of this layer and rank.
            key, value: [T, H, D]; keys after rotation.
            positions: int64 [T], the token's place in its sequence.
            slots: int64 [T], block * N + offset; -1 marks padding, which is skipped.
            pages: written in place; only bytes of the given slots change.

        """

    def write_window(self, key: Tensor, value: Tensor, slots: Tensor, pages: Tensor) -> None:
        """Copy a step's tokens into the exact window's `pages` (`Window.pages`); arguments as in `write`."""

    def attend(
        self,
        codec: LayerCodec,
        query: Tensor,
        pages: Tensor,
        batch: Batch,
        scale: float,
        window: Window | None,
        output: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of a step's queries to everything stored, themselves included.

        Args:
            codec: of this layer and rank.
            query: [at least T, H * G, D]; query head h * G + g reads KV head h.
            pages: uint8 [B, C, N].
            batch: of the step.
            scale: of the scores.
            window: None where everything is read as stored.
            output: where to write, [T, H * G, D] in any floating dtype with contiguous heads; None: a new float32 tensor.

        Returns:
            `output`, or float32 [at least T, H * G, D], T being the last of `batch.query_start`; rows past T mean nothing.

        """
