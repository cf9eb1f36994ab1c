"""What a probe is read from, apart from any Trainer: the kinds of batch, and what is refused."""

import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_aop.monitor.probe import Probe, Stratified, collect, from_loader, source_of

IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1])


def test_a_tensor_is_a_batch_without_labels() -> None:
    probe = Probe.from_batch(IMAGES, limit=2)
    assert torch.equal(probe.images, IMAGES[:2])
    assert probe.labels is None
    assert probe.with_masks(lambda row, classes: pytest.fail("nothing to ask for")) is probe


def test_masks_of_one_class_and_of_each() -> None:
    of_the_label = torch.rand(3, 6, 5) > 0.5
    probe = Probe.from_batch({"image": IMAGES, "label": LABELS, "masks": of_the_label})
    assert probe.masks is not None
    assert probe.mask_pairs is not None
    assert torch.equal(probe.masks, of_the_label)
    assert probe.mask_pairs.tolist() == [[0, 2], [1, 0], [2, 1]]
    hot = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    of_each = torch.rand(3, 3, 6, 5) > 0.5
    probe = Probe.from_batch((IMAGES, hot, of_each))
    assert probe.masks is not None
    assert probe.mask_pairs is not None
    assert probe.mask_pairs.tolist() == [[0, 0], [0, 2], [2, 1]]
    assert torch.equal(probe.masks, torch.stack([of_each[0, 0], of_each[0, 2], of_each[2, 1]]))
    nothing = Probe.from_batch((IMAGES, torch.zeros_like(hot), of_each))
    assert nothing.masks is None


def test_masks_of_another_shape_are_said_to_be_left_out() -> None:
    other = torch.zeros(3, 4, 4, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"masks have shape \[3, 4, 4\], where \[3, 6, 5\]"):
        probe = Probe.from_batch({"image": IMAGES, "label": LABELS, "masks": other})
    assert probe.masks is None
    assert Probe.from_batch((IMAGES, LABELS, other)).masks is None  # may be anything


class Features(Dataset[Any]):
    """Samples that are no pictures, with the pictures beside them."""

    image_dataset = TensorDataset(IMAGES, LABELS)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(7), LABELS[index]


def test_pictures_are_found_below_subsets_of_features() -> None:
    nested = Subset(Subset(Features(), [2, 0, 1]), [1, 2])
    for source in (collect(nested, None), collect(5, DataLoader(nested, batch_size=2))):
        assert torch.equal(source.batch[0], IMAGES[[0, 1]])
        assert source.batch[1].tolist() == [2, 0]


class Ready(Dataset[Any]):
    """Each of its samples is a batch."""

    def __getitem__(self, index: int) -> Any:
        return IMAGES + index, LABELS

    def __len__(self) -> int:
        return 2


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield IMAGES[0]


def test_a_dataset_that_makes_its_own_batches() -> None:
    loader: Any = DataLoader(Ready(), batch_size=None)
    assert torch.equal(collect(2, loader).batch[0], IMAGES)


def test_what_cannot_be_a_probe_is_refused() -> None:
    with pytest.raises(TypeError, match="a dataset with a length or a callable, got Endless"):
        collect(Endless(), None)
    with pytest.raises(ValueError, match="the dataset is empty: pass the probe itself"):
        collect(2, DataLoader(TensorDataset(IMAGES[:0])))
    with pytest.raises(ValueError, match="a Tensor has no dataset to take 2 samples from"):
        collect(2, IMAGES)
    with pytest.raises(ValueError, match="no data loader to take the probe from"):
        collect(2, [])
    assert source_of(2, []) is None


def test_a_loader_is_no_probe(unchecked: None) -> None:
    loader: Any = DataLoader(TensorDataset(IMAGES))
    with pytest.raises(TypeError, match=r"got DataLoader: .* probe=loader\.dataset"):
        collect(loader, None)


# --------------------------------------------------------------------------------------------------
# the dataset that training uses is left as it was


class Marked(Dataset[Any]):
    """Counts its reads, draws from its own generator, and opens a file at the first sample."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(range(100)))
        self.path, self.file = path, None
        self.generator, self.reads = np.random.default_rng(0), 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        self.generator.random()
        self.file = self.file or self.path.open("rb", buffering=0)  # type: ignore[assignment]
        assert self.file is not None
        return IMAGES[index] + self.file.read(1)[0], LABELS[index]

    def input_masks(self, index: int, classes: Any) -> Tensor:
        self.reads += 1
        return torch.full((len(classes), 6, 5), index == 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_no_mark(tmp_path: Path, workers: int) -> None:
    data = Marked(tmp_path / "data")
    before, rng = repr(data.generator.bit_generator.state), torch.get_rng_state()
    found = collect(2, DataLoader(data, batch_size=1, num_workers=workers))
    assert torch.equal(found.batch[0], IMAGES[:2] + torch.tensor([0.0, 1.0])[:, None, None, None])
    assert found.read_masks is not None
    probe = Probe.from_batch(found.batch, found.limit).with_masks(found.read_masks)
    assert probe.masks is not None
    assert probe.masks.flatten(1).all(dim=1).tolist() == [False, True]
    assert torch.equal(collect(data, None).batch[1], LABELS)
    assert (data.file, data.reads) == (None, 0)
    assert before == repr(data.generator.bit_generator.state)
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.skipif(sys.platform != "linux", reason="a fork is tried on Linux only")
def test_a_file_that_is_open_already_keeps_its_place(tmp_path: Path) -> None:
    data = Marked(tmp_path / "data")
    data[0]
    assert data.file is not None
    collect(3, DataLoader(data))
    assert data.file.tell() == 1
    data.file.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a fork is tried on Linux only")
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_map_of_a_file_is_read_and_keeps_its_values(tmp_path: Path, context: str) -> None:
    numbers = np.arange(6000, dtype=np.float32)
    numbers.tofile(tmp_path / "numbers")
    mapped: Any = np.memmap(tmp_path / "numbers", np.float32, "r+", offset=4 * 5000)
    shared = torch.arange(1000.0).share_memory_()
    loader = DataLoader(Written(mapped, shared), num_workers=1, multiprocessing_context=context)
    assert collect(3, loader).batch[1].tolist() == [5001, 5002, 5003]
    assert np.array_equal(mapped, numbers[5000:])
    assert np.array_equal(np.fromfile(tmp_path / "numbers", np.float32), numbers)
    assert torch.equal(shared, torch.arange(1000.0))


class Written(Dataset[Any]):
    """Writes into the memory that it reads."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        for array in self.arrays:
            array[index] += 1
        return IMAGES[index], torch.tensor(float(self.arrays[0][index]))


class Lines(IterableDataset[Any]):
    """Goes on where it was left."""

    def __init__(self) -> None:
        self.samples = ((image, label) for image, label in zip(IMAGES, LABELS, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return self.samples


@pytest.mark.skipif(sys.platform != "linux", reason="a fork is tried on Linux only")
def test_a_stream_is_not_used_up() -> None:
    data = Lines()
    assert collect(2, DataLoader(data)).batch[1].tolist() == [2, 0]
    assert len(list(data)) == 3


def test_a_stream_that_cannot_be_copied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_aop.monitor.reading._context", lambda loader: None)
    with pytest.raises(
        ValueError, match=r"Lines can't be copied .*generator.*: pass the probe itself"
    ):
        collect(2, DataLoader(Lines()))


def test_a_queue_that_other_processes_read_is_refused() -> None:
    class Received(IterableDataset[Any]):
        def __init__(self) -> None:
            self.queue = multiprocessing.get_context("spawn").SimpleQueue()

        def __iter__(self) -> Iterator[Any]:
            yield self.queue.get()

    with pytest.raises(
        ValueError, match=r"Received reads from a SimpleQueue.*pass the probe itself"
    ):
        collect(2, DataLoader(Received()))


def test_a_decoder_in_another_process_is_refused() -> None:
    class Decoded(Dataset[Any]):
        def __init__(self, decoder: subprocess.Popen[str]) -> None:
            self.decoder = decoder

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            assert self.decoder.stdout is not None
            return IMAGES[index], int(self.decoder.stdout.readline())

    command = [sys.executable, "-c", "print(1, 2, 3, sep='\\n')"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as decoder:
        with pytest.raises(ValueError, match=r"Decoded reads from .*pass the probe itself"):
            collect(2, DataLoader(Decoded(decoder)))
        assert decoder.stdout is not None
        assert decoder.stdout.read() == "1\n2\n3\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the copy's file
def test_a_copy_is_read_where_there_can_be_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_aop.monitor.reading._context", lambda loader: None)
    data = Marked(tmp_path / "data")
    assert collect(2, DataLoader(data)).batch[1].tolist() == [2, 0]
    assert (data.file, data.reads) == (None, 0)


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise KeyError("no such picture")


def test_an_error_in_the_worker_is_one_sentence() -> None:
    text = "3 samples of Broken could not be read in a worker process. KeyError: .*no such picture"
    with pytest.raises(RuntimeError, match=text) as raised:
        collect(3, DataLoader(Broken(), num_workers=1))
    assert "\n" not in str(raised.value)
    text = r"3 samples of Broken could not be read. KeyError: .*such picture.*pass the probe itself"
    with pytest.raises(RuntimeError, match=text):
        collect(3, DataLoader(Broken()))


class Stuck(Broken):
    def __getitem__(self, index: int) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as good as stuck in a fork
        threading.Event().wait()


@pytest.mark.wide
def test_a_worker_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_aop.monitor.reading._SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
        collect(3, DataLoader(Stuck(), num_workers=1))
    # The process would wait for it at its end.
    assert multiprocessing.active_children() == []


class Pooled(Broken):
    """Reads by threads of its own, which a fork would wait for in vain."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(1)

    def __getitem__(self, index: int) -> Any:
        return self.threads.submit(lambda: (IMAGES[index], LABELS[index])).result()


def test_threads_of_a_dataset_are_not_waited_for_in_a_fork() -> None:
    data = Pooled()
    assert data[1][1] == 0
    with pytest.raises(ValueError, match=r"Pooled can't be copied .*pass the probe itself"):
        collect(3, DataLoader(data))
    # Before the first of them runs a fork has its own.
    assert collect(2, DataLoader(Pooled())).batch[1].tolist() == [2, 0]
    data.threads.shutdown()


def test_a_loader_without_a_dataset_gives_its_first_batch() -> None:
    class Around:
        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2))

    assert collect(2, Around()).batch[1].tolist() == [2, 0]


def test_the_worker_is_started_as_the_loader_does() -> None:
    def start(worker: int) -> None:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        info.dataset.tensors[1].fill_(4)  # type: ignore[attr-defined]

    loader = DataLoader(TensorDataset(IMAGES, LABELS.clone()), num_workers=2, worker_init_fn=start)
    assert collect(2, loader).batch[1].tolist() == [4, 4]
    assert torch.equal(loader.dataset.tensors[1], LABELS)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------
# loaders that change their batches, or whose samplers alone can read the dataset


class Scaled(DataLoader[Any]):
    """Makes of each batch what the model takes, and counts."""

    given = 0

    def __iter__(self) -> Any:
        for images, labels in super().__iter__():
            self.given += 1
            yield {"image": images * 10, "label": labels, "given": self.given}


class Wrapped:
    """Another way to do so, which has all that its loader has."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        for images, labels in self.loader:
            yield {"image": images * 10, "label": labels}


def started(worker: int) -> None:
    info: Any = torch.utils.data.get_worker_info()
    info.dataset.targets = info.dataset.targets + 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loader_that_changes_its_batches_makes_that_of_the_probe(
    workers: int, wrapped: bool
) -> None:
    data = Numbered(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
    generator = torch.Generator().manual_seed(3)
    settings: dict[str, Any] = {"shuffle": True, "drop_last": True, "generator": generator}
    settings |= {"num_workers": workers, "persistent_workers": workers > 0}
    if wrapped:
        loader: Any = Wrapped(DataLoader(data, 2, **settings))
    else:
        loader = Scaled(data, 2, worker_init_fn=started, **settings)
    begun = iter(loader)
    first, given, state = next(begun), getattr(loader, "given", 0), generator.get_state()
    later = not wrapped and workers > 0  # as `started` does
    for count, samples in ((3, [0, 1, 2]), (20, [*range(8)]), ([6, 1, 3], [6, 1, 3])):
        found = collect(count, loader)
        assert (found.batch["image"][:, 0, 0, 0] / 10).tolist() == samples
        assert torch.equal(found.batch["label"], data.targets[samples] + later)
        assert found.read_masks is not None
        probe = Probe.from_batch(found.batch).with_masks(found.read_masks)
        assert probe.masks is not None
        assert [int(mask.any(dim=1).nonzero()[0]) for mask in probe.masks] == samples
    assert getattr(loader, "given", 0) == given
    assert torch.equal(generator.get_state(), state)
    assert (loader.num_workers, loader.batch_size) == (workers, 2)
    seen = [first, *begun]
    assert sorted(int(i) for batch in seen for i in batch["image"][:, 0, 0, 0] / 10) == [*range(8)]


def test_a_stream_of_samples_is_changed_by_its_loader() -> None:
    assert torch.equal(collect(5, Scaled(Lines(), 1, drop_last=True)).batch["image"], IMAGES * 10)
    ready = collect(2, Scaled(Ready(), batch_size=None)).batch  # type: ignore[arg-type]
    assert torch.equal(ready["image"], IMAGES * 10)
    with pytest.raises(ValueError, match="the dataset is empty"):
        collect(2, Scaled(TensorDataset(IMAGES[:0], LABELS[:0])))


def test_workers_that_are_under_way_are_not_asked() -> None:
    class Infinite(Wrapped):
        def __init__(self, loader: Any) -> None:
            super().__init__(loader)
            self.iterator = iter(loader)

        def __iter__(self) -> Iterator[Any]:
            return self.iterator  # type: ignore[no-any-return]

    many = Numbered([(i, str(i)) for i in range(20_000)])
    loader = Infinite(DataLoader(Subset(many, range(3)), num_workers=1, collate_fn=list))
    with pytest.raises(ValueError, match=r"Infinite reads from a _MultiProcessingDataLoaderIter"):
        collect(2, loader)
    loader.iterator._shutdown_workers()


class Keyed(Dataset[Any]):
    """Has keys for indices, and images of several sizes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: str) -> Any:
        size = 8 + int(key[1:]) % 2
        return torch.full((3, size, size), float(key[1:])), int(key[1:])


class Keys:
    """A sampler of the keys, or of batches of them, that counts."""

    def __init__(self, *keys: Any) -> None:
        self.keys, self.given = keys, 0

    def __iter__(self) -> Iterator[Any]:
        for key in self.keys:
            self.given += 1
            yield key


@pytest.mark.parametrize("workers", [0, 1])
def test_what_only_a_sampler_can_read_is_the_loaders_first_batch(workers: int) -> None:
    batches = Keys(["k3", "k1"], ["k2", "k0"])
    one = Keys("k2", "k1", "k0")
    for settings, labels in (({"batch_sampler": batches}, [3, 1]), ({"sampler": one}, [2])):
        loader: Any = DataLoader(Keyed(), num_workers=workers, **settings)  # type: ignore[arg-type]
        found = collect(4, loader)
        assert found.batch[0][:, 0, 0, 0].tolist() == labels
        assert found.batch[1].tolist() == labels
        assert found.origin == "the loader's first batch"
    assert batches.given == one.given == 0
    with pytest.raises(RuntimeError, match=r"2 samples of Keyed could not be read.*pass the probe"):
        collect([1, 2], loader)


def test_images_of_a_subclass_are_plain_in_the_probe() -> None:
    class Named(Tensor):
        """Knows where it comes from, and refuses to be joined."""

    images = torch.rand(2, 3, 8, 8).as_subclass(Named)
    probe = Probe.from_batch((images, torch.tensor([0, 1])))
    assert type(probe.images) is Tensor
    assert torch.equal(probe.images, torch.Tensor(images))


class Numbered(Dataset[Any]):
    """Each image and its masks say which sample they are of."""

    def __init__(self, targets: Any) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, 8, 8), float(index)), torch.as_tensor(self.targets[index])

    def input_masks(self, index: int, classes: Sequence[int]) -> Tensor:
        masks = torch.zeros(len(classes), 8, 8).bool()
        masks[:, index % 8] = True
        return masks


def marks(source: Any, loader: Any) -> list[int]:
    return [int(each[0, 0, 0]) for each in collect(source, loader).batch[0]]


def test_samples_are_named_by_their_index_with_their_masks() -> None:
    loader = DataLoader(Numbered([0, 1, 2, 0, 1, 2, 0, 1]), batch_size=2)
    found = collect([6, 1, 3], loader)
    assert [int(image[0, 0, 0]) for image in found.batch[0]] == [6, 1, 3]
    assert found.read_masks is not None
    probe = Probe.from_batch(found.batch).with_masks(found.read_masks)
    assert probe.masks is not None
    assert [int(mask.any(dim=1).nonzero()[0]) for mask in probe.masks] == [6, 1, 3]
    for indices in (
        range(1, 6, 2),
        np.array([1, 3, 5]),
        torch.tensor([1, 3, 5]),
        (1, np.int64(3), 5),
    ):
        assert marks(indices, loader) == [1, 3, 5]
    for three in (np.int64(3), np.array(3), torch.tensor(3)):
        assert marks(three, loader) == [0, 1, 2]
    for wrong in (torch.tensor([True, False]), np.array([0.0, 1.0]), torch.rand(2), [True, False]):
        assert from_loader(wrong) is None
    below = DataLoader(Subset(Numbered([0, 1, 2, 0]), [3, 1]))
    assert marks([1, 0], below) == [1, 3]
    for wrong in ([8], [-1, 2]):
        with pytest.raises(ValueError, match=r"probe must name samples in 0\.\.7, got"):
            collect(wrong, loader)
    with pytest.raises(ValueError, match="has no dataset with indices"):
        collect([1], range(3))


def test_a_stratified_probe_has_as_many_of_each_class() -> None:
    classes = [0, 0, 0, 2, 1, 0, 2, 2, -1]
    tensors = TensorDataset(
        torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 8, 8), torch.tensor(classes)
    )
    for data in (Numbered(classes), Numbered(np.array(classes)), tensors):
        assert marks(Stratified(2), DataLoader(data)) == [0, 1, 3, 4, 6]
        assert marks(Stratified(1), DataLoader(data)) == [0, 3, 4]
    subset = Subset(Subset(Numbered(classes), [8, 7, 6, 5, 4, 3]), [1, 2, 3, 4, 5])
    assert marks(Stratified(1), DataLoader(subset)) == [7, 5, 4]
    # A column of classes, as MedMNIST has it, and classes by other names.
    column = np.array(classes)[:, None]
    floats = torch.tensor(classes).float()
    for labels in (column, torch.from_numpy(column), column.tolist(), floats, floats[:, None]):
        assert Stratified(2).indices(Numbered(labels)) == [0, 1, 3, 4, 6]
    names = ["b", "b", "a", "c", "a"]
    for text in (names, np.array(names), np.array(names)[:, None]):
        assert Stratified(1).indices(Numbered(text)) == [0, 2, 3]
    assert Stratified(1).indices(Numbered([True, True, False])) == [0, 2]
    for values in (torch.rand(4), torch.rand(4, 1), [0.5, 1.5]):
        with pytest.raises(ValueError, match="has neither targets nor labels"):
            Stratified(1).indices(Numbered(values))
    several = Numbered(torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]]))
    assert marks(Stratified(1), DataLoader(several)) == [0, 1]
    with pytest.raises(
        ValueError, match=r"Unsaid has neither targets nor labels .* probe=\[12, 97"
    ):
        collect(Stratified(), DataLoader(Unsaid([0, 1])))
    with pytest.raises(ValueError, match="per_class must be above 0"):
        Stratified(0)


class Unsaid(Numbered):
    def __init__(self, targets: Any) -> None:
        self.hidden = targets

    def __len__(self) -> int:
        return len(self.hidden)
