import json
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from unimoe.data import ModalityBatchSampler, read_samples, write_samples
from unimoe.data.stream import SampleStream
from unimoe.errors import UserError


def record(number, kind):
    asked = [{"type": name, "url": "data:,x"} for name in kind.split("+") if name != "text"]
    asked.append({"type": "text", "text": str(number)})
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "Yes."}]}


def write(path, kinds, first=0):
    lines = [json.dumps(record(number, kind)) for number, kind in enumerate(kinds, first)]
    path.write_text("\n".join(lines))
    return str(path)


def number(sample):
    return int(sample.messages[0]["content"][-1]["text"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    kinds = ["image"] * 23 + ["text"] * 9 + ["speech"] * 4 + ["image+speech"]
    np.random.default_rng(0).shuffle(kinds)
    first = write(folder / "a.jsonl", kinds[:20])
    write(folder / "b.jsonl", kinds[20:], 20)
    write_samples(folder / "b.parquet", read_samples(folder / "b.jsonl"))
    return [first, str(folder / "b.parquet")]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (2, 2), (3, 0)])
def test_an_epoch_holds_every_sample_once_and_like_with_like(files, world_size, workers):
    steps = sum(1 for _ in zip(epoch(files, 4 * world_size, world_size), range(100), strict=False))
    ranks = []
    for rank in range(world_size):
        stream = SampleStream(files, 4, steps, seed=3, buffer=8, world_size=world_size, rank=rank)
        ranks.append(list(DataLoader(stream, batch_size=None, num_workers=workers)))
    assert sorted(number(s) for batches in ranks for batch in batches for s in batch) == list(range(37))
    for together in zip(*ranks, strict=True):
        kinds = {sample.modality for batch in together for sample in batch}
        assert len(kinds) == 1 or world_size > 1 and "image+speech" in kinds
        assert all(together)


def epoch(files, size, world_size):
    """The global batches of the first epoch."""
    stream = SampleStream(files, size // world_size, 1, seed=3, buffer=8, world_size=world_size)
    seen = 0
    for batch in stream.global_batches():
        yield batch
        seen += len(batch)
        if seen == 37:
            return


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("streamed", [True, False])
def test_ten_thousand_mixed_samples_each_once_an_epoch(tmp_path, world_size, streamed):
    share = {"text": 0.4, "image": 0.3, "speech": 0.2, "image+speech": 0.0995, "image+video": 0.0005}
    kinds = np.random.default_rng(0).choice(list(share), 10_000, p=list(share.values())).tolist()
    path = write(tmp_path / "a.jsonl", kinds)
    if streamed:
        stream = SampleStream([path], 7, 1, world_size=world_size)
        seen: list[int] = []
        for batch in stream.global_batches():
            seen += map(number, batch)
            assert len(batch) >= world_size
            if len(seen) >= 10_000:
                break
    else:
        samples = read_samples(path)
        kinds = [sample.modality for sample in samples]
        ranks = [
            ModalityBatchSampler(kinds, 7, world_size=world_size, rank=rank) for rank in range(world_size)
        ]
        seen = [number(samples[index]) for sampler in ranks for batch in sampler for index in batch]
    assert sorted(seen) == list(range(10_000))


def test_resumes_where_it_was_and_refuses_another_order(files):
    whole = [list(map(number, batch)) for batch in SampleStream(files, 4, 25, seed=3, buffer=8)]
    assert len(whole) == 25 and whole != sorted(whole)
    resumed = SampleStream(files, 4, 25, seed=3, buffer=8)
    resumed.load_state_dict(SampleStream(files, 4, 25, seed=3, buffer=8).state_dict(13))
    assert [list(map(number, batch)) for batch in resumed] == whole[13:]
    with pytest.raises(UserError, match="seed was 3, now it is 4"):
        SampleStream(files, 4, 25, seed=4, buffer=8).load_state_dict(resumed.state_dict(2))


def test_weights_are_shares(tmp_path):
    sources = [write(tmp_path / "a.jsonl", ["text"] * 7), write(tmp_path / "b.jsonl", ["text"] * 70, 7)]
    stream = SampleStream(sources, 10, 200, weights=[0.75, 0.25], buffer=50)
    used = Counter(number(sample) < 7 for batch in stream for sample in batch)
    assert used[True] / 2000 == pytest.approx(0.75, abs=0.03)


def test_faults_name_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl: there are no samples"):
        next(iter(SampleStream([str(tmp_path / "a.jsonl")], 4, 5)))
    with pytest.raises(UserError, match="there is no data file"):
        SampleStream([str(tmp_path / "b.jsonl")], 4, 5)
    with pytest.raises(UserError, match="at least 1"):
        SampleStream([], 4, 5, buffer=0)
