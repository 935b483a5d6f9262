"""What every engine promises, as plain functions of an engine that raise where it does not keep it."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.cases import (
    CANARY,
    MIXED,
    Case,
    Step,
    expect,
    expect_close,
    make_artifact,
    make_step,
    make_tokens,
    packed_by_hand,
)
from vllm_kvsplice.engines import Engine

# All relative to the largest output (about 3). Measured on the reference engine over every case below: 2.3e-6. The CPU
# engine's queries have 16 bits and its probabilities 15: 7.8e-5; with AMX, where the mean keys of prompts have 16 bits as
# well: 1.8e-4. bfloat16 rounds by 2e-3.
ORACLE_LIMIT, CPU_ORACLE_LIMIT = 5e-6, 2e-4
# Very many rows of a bfloat16 model read keys in bfloat16 with AMX: 1.3e-3.
BFLOAT16_LIMIT = 2e-3
# Between two float32 runs of the reference that only sum in another order; measured: 1.8e-7. The CPU engine promises the
# same bits, but not with AMX, which multiplies many rows in one way and few in another.
ORDER_LIMIT = 1e-6

STEP = Case(MIXED)
WINDOWED = Case(MIXED, window=16)


def oracle_limit(engine: Engine, case: Case = STEP) -> float:
    if getattr(engine, "isa", None) == "amx" and case.dtype == torch.bfloat16:
        return BFLOAT16_LIMIT
    return getattr(engine, "oracle_limit", CPU_ORACLE_LIMIT if hasattr(engine, "isa") else ORACLE_LIMIT)


def order_limit(engine: Engine) -> float:
    by_isa = {None: ORDER_LIMIT, "amx": CPU_ORACLE_LIMIT}
    return getattr(engine, "order_limit", by_isa.get(getattr(engine, "isa", None), 0))


def check_store(engine: Engine, case: Case = STEP) -> None:
    """Random slots get the documented bytes, padding (-1) goes nowhere, every other byte survives."""
    codec, blocks, random = case.codec(), 5, torch.Generator().manual_seed(case.seed)
    pages = torch.full((blocks, codec.layout.token_bytes, case.block), CANARY, dtype=torch.uint8)
    slots = torch.randperm(blocks * case.block, generator=random)[:17]
    slots[torch.randperm(17, generator=random)[:3]] = -1
    key, value, positions = make_tokens(codec, 17, seed=case.seed)
    expected = pages.clone()
    codes = codec.encode(key, value, positions).tolist()
    for slot, row in zip(slots.tolist(), codes, strict=True):
        if slot >= 0:
            expected[slot // case.block, :, slot % case.block] = torch.tensor(list(packed_by_hand(codec.layout, row)))
    engine.write(codec, key, value, positions, slots, pages)
    expect(torch.equal(pages, expected), f"written slots and nothing else change as documented, {case}")


def check_window_store(engine: Engine, case: Case = WINDOWED) -> None:
    """The window's pages get each token's key and value as they are, padding (-1) goes nowhere."""
    step = make_step(case).store(engine)
    expected = torch.full_like(step.window_pages, torch.nan)
    key, value, _ = step.tokens
    size = step.window_pages.shape[2]
    for slot, token in zip(step.window_slots.tolist(), torch.cat((key, value), -1), strict=True):
        if slot >= 0:
            expected[slot // size, :, slot % size] = token
    same = (step.window_pages == expected) | (step.window_pages.isnan() & expected.isnan())
    expect(same.all(), f"the window holds its tokens and nothing else changes, {case}")


def check_chunks(engine: Engine, case: Case = STEP) -> None:
    """However a sequence is cut into steps, its bytes are the same."""
    whole = make_step(replace(case, sequences=((1, 65),))).store(engine)
    for chunk in (1, 7, 16, 17, 64):
        step = make_step(replace(case, sequences=((1, 65),)))
        for part in zip(*(x.split(chunk) for x in (*step.tokens, step.slots)), strict=True):
            engine.write(step.codec, *part, step.pages)
        expect(torch.equal(step.pages, whole.pages), f"chunks of {chunk} store the same bytes, {case}")


def check_attention(engine: Engine, case: Case = STEP) -> None:
    """Attention over pages is dense attention over what the codec restores."""
    step = make_step(case).store(engine)
    expect_close(step.attend(engine), step.oracle(), oracle_limit(engine, case), f"attention equals the oracle, {case}")


def check_poison(engine: Engine, case: Case = STEP) -> None:
    """Bytes that no query of the step reads have no influence at all, in neither cache."""
    step = make_step(case).store(engine)
    before = step.attend(engine)
    foreign = step.unread()[:, None].expand_as(step.pages)
    noise = torch.randint(256, step.pages.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(case.seed))
    for poison in (torch.tensor(0, dtype=torch.uint8), torch.tensor(255, dtype=torch.uint8), noise):
        after = replace(poisoned_window(step, poison), pages=torch.where(foreign, poison, step.pages)).attend(engine)
        expect(after.isfinite().all(), f"output is finite, {case}")
        expect(torch.equal(before, after), f"foreign bytes have no influence, {case}")


def poisoned_window(step: Step, poison: Tensor) -> Step:
    """The same step with NaN or infinities wherever the exact window holds no token that one of its queries reads."""
    if step.window_pages is None:
        return step
    foreign = torch.ones(step.window_pages.shape[0] * step.window_pages.shape[2], dtype=torch.bool)
    foreign[step.window_slots[step.window_slots >= 0]] = False
    foreign = foreign.view(-1, 1, step.window_pages.shape[2], 1)
    return replace(
        step, window_pages=step.window_pages.masked_fill(foreign, [torch.inf, torch.nan][int(poison.max() > 0)])
    )


def check_batching(engine: Engine, case: Case = STEP) -> None:
    """A sequence's output does not depend on its neighbours in the step, nor on its place among them."""
    step = make_step(case).store(engine)
    together = step.attend(engine).split([len(r.query) for r in step.requests])
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = step.pick(order).attend(engine).split([len(together[i]) for i in order])
    for place, index in enumerate(order):
        alone = step.pick([index]).attend(engine)
        expect_close(
            together[index], alone, order_limit(engine), f"sequence {index} in a batch equals itself alone, {case}"
        )
        expect_close(
            shuffled[place], alone, order_limit(engine), f"sequence {index} in any place equals itself alone, {case}"
        )


def check_strided(engine: Engine, case: Case = STEP) -> None:
    """Pages of one layer among others' (only each page itself is contiguous) behave like pages alone."""
    near = make_step(case).store(engine)
    storage = torch.full((near.pages.shape[0], 3, *near.pages.shape[1:]), CANARY, dtype=torch.uint8)
    far = replace(near, pages=storage[:, 1]).store(engine)
    expect(torch.equal(far.pages, near.pages), "strided pages hold the same bytes")
    expect((storage[:, 0::2] == CANARY).all(), "other layers' bytes survive")
    storage[:, 0::2] = 255
    expect(torch.equal(far.attend(engine), near.attend(engine)), "strided pages give the same output")


def check_ranks(engine: Engine, heads: int = 6, ranks: int = 3) -> None:
    """Tensor-parallel ranks side by side equal one rank."""
    case = Case(MIXED, heads=heads, group=4, dim=32)
    whole = make_step(case).store(engine)
    artifact, outputs = make_artifact(whole.codec, case.group), []
    for rank in range(ranks):
        # vLLM hands a rank its share of the query heads in order, and the KV heads that those read.
        queries = whole.query.shape[1] // ranks
        own = slice(rank * heads // ranks, max((rank + 1) * heads // ranks, rank * heads // ranks + 1))
        requests = [
            replace(
                r,
                query=r.query[:, rank * queries : (rank + 1) * queries],
                key=r.key[:, own],
                value=r.value[:, own],
            )
            for r in whole.requests
        ]
        codec = artifact.layer_shard(0, rank, ranks)
        pages = torch.full((len(whole.pages), codec.layout.token_bytes, case.block), CANARY, dtype=torch.uint8)
        outputs.append(Step(codec, requests, pages, whole.scale).store(engine).attend(engine))
    expect_close(torch.cat(outputs, 1), whole.attend(engine), order_limit(engine), f"{ranks} ranks equal one")
