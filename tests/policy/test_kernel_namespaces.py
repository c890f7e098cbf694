"""Namespaces made, destroyed and brought back, with a fake of ndctl that keeps real label areas.

The fake's namespaces are what its labels say; their bytes are in one file, and what is written to a
namespace's device gets there.
"""

import errno
import shutil
from uuid import UUID, uuid4

import pytest
from fake_kernel import FakeKernel, Session, refused

from pmemkit.errors import Busy, Corrupt, InvalidArgument, NotSupported, PmemError, SystemFailure
from pmemkit.formats.labels import LabelV1, apply, initialise, read_area
from pmemkit.policy.kernel_names import with_names_of_now
from pmemkit.storage.signatures import identify

MIB = 1 << 20
SIZE = 64 * MIB
AREA = 128 << 10
REGION = "platform/ndbus0/region1"
VERBS = (
    "create-namespace",
    "destroy-namespace",
    "disable-namespace",
    "enable-namespace",
    "read-labels",
    "write-labels",
    "init-labels",
    "disable-region",
    "enable-region",
)
INFO = b"the info block".ljust(4096, b"!")


class NdKernel(FakeKernel):
    """One region of one dimm, with labels or without."""

    def __post_init__(self):
        super().__post_init__()
        self.tree.device("nd", "platform/ndbus0", provider="ACPI.NFIT")
        self.tree.device("nd", "platform/ndbus0/nmem0", commands="get_data set_data", flags="label")
        self.region = self.tree.device(
            "nd",
            REGION,
            driver="nd_region",
            size=SIZE,
            available_size=SIZE,
            mappings=1,
            mapping0=f"nmem0,0,{SIZE},0",
            nstype=4,
            target_node=1,
        )
        self.media = bytearray(SIZE)
        self.area = bytes(AREA)
        self.attached = {}
        for each in VERBS:
            self.handlers[f"ndctl {each}"] = getattr(self, each.replace("-", "_"))

    # --- what there is ------------------------------------------------------------------------

    def start(self, *, labels=True):
        """As after boot."""
        self.area = apply(self.area, initialise(self.area)) if labels else self.area
        self.probe()
        return self

    def probe(self):
        """Namespaces are what the labels say, or the whole region."""
        for place in self.region.glob("namespace1.*"):
            self.detach(place.name)
            (self.tree.sysfs / "bus/nd/devices" / place.name).unlink(missing_ok=True)
            shutil.rmtree(place)
        labels = read_area(self.area)
        self.tree.put(self.region / "nstype", 4 if labels.current is None else 5)
        if labels.current is None:
            self.show("namespace1.0", 0, SIZE)
        for number, label in enumerate(sorted(labels.labels, key=lambda each: each.dpa)):
            uuid = str(label.uuid)
            self.show(f"namespace1.{number}", label.dpa, label.rawsize, uuid=uuid)

    def show(self, name, start, size, uuid=""):
        info = bytes(self.media[start + 4096 : start + 4096 + len(INFO)])
        self.tree.device(
            "nd",
            f"{REGION}/{name}",
            size=size,
            resource=hex((1 << 32) + start),
            uuid=uuid,
            mode="raw",
            holder="",
            holder_class="pfn" if info == INFO else "",
            force_raw=0,
        )
        self.attach(name)

    def place(self, name):
        return self.region / name

    def span(self, name):
        place = self.place(name)
        start = int((place / "resource").read_text(), 0) - (1 << 32)
        return start, int((place / "size").read_text())

    def attach(self, name):
        """The device of a namespace: all of it, or what is behind an info block."""
        start, size = self.span(name)
        raw = (self.place(name) / "force_raw").read_text().strip() == "1"
        has_info = bytes(self.media[start + 4096 : start + 4096 + len(INFO)]) == INFO
        skip = 0 if raw or not has_info else MIB
        disk = f"pmem1.{name[-1]}"
        self.tree.put(self.place(name) / "mode", "memory" if skip else "raw")
        self.tree.put(self.place(name) / "block" / disk / "size", (size - skip) >> 9)
        (self.tree.dev / disk).write_bytes(self.media[start + skip : start + size])
        self.tree.bind("nd", self.place(name), "nd_pmem")
        self.attached[name] = (disk, start + skip)

    def detach(self, name):
        disk, start = self.attached.pop(name, (None, 0))
        if disk is not None:
            data = (self.tree.dev / disk).read_bytes()
            self.media[start : start + len(data)] = data
            (self.tree.dev / disk).unlink()
            shutil.rmtree(self.place(name) / "block")
        self.tree.bind("nd", self.place(name), None)

    def device(self, name):
        return self.tree.dev / self.attached[name][0]

    def names(self):
        return sorted(place.name for place in self.region.glob("namespace1.*"))

    # --- ndctl --------------------------------------------------------------------------------

    def create_namespace(self, words, _given):
        def option(name):
            return words[words.index(name) + 1] if name in words else None

        old = option("--reconfig")
        current = read_area(self.area)
        if current.current is not None:
            start, size = self.span(old) if old else (self.free(), int(option("--size")))
            ours = [each.slot for each in current.labels if each.dpa == start]
            label = LabelV1(
                uuid=uuid4(),
                dpa=start,
                rawsize=size,
                nlabel=1,
                position=0,
                isetcookie=1,
                slot=0,
                name=(option("--name") or "").encode(),
            )
            for name in self.names():
                self.detach(name)
            self.area = apply(self.area, current.update(add=[label], remove=ours))
        else:
            start, size = self.span(old)
            self.detach(old)
        info = INFO if option("--mode") != "raw" else bytes(4096)
        self.media[start + 4096 : start + 8192] = info
        self.probe()

    def free(self):
        labels = read_area(self.area).labels
        return max((each.dpa + each.rawsize for each in labels), default=0)

    def destroy_namespace(self, words, _given):
        name = words[-1]
        start, _ = self.span(name)
        for each in self.names():
            self.detach(each)
        self.media[start + 4096 : start + 8192] = bytes(4096)
        labels = read_area(self.area)
        if labels.current is not None:
            slots = [each.slot for each in labels.labels if each.dpa == start]
            self.area = apply(self.area, labels.update(remove=slots))
        self.probe()

    def disable_namespace(self, words, _given):
        self.detach(words[0])

    def enable_namespace(self, words, _given):
        self.attach(words[-1])

    def read_labels(self, _words, _given):
        return self.area

    def write_labels(self, _words, given):
        assert not (self.region / "driver").exists(), "the dimm is active, abort label write"
        self.area = bytes(given)

    def init_labels(self, _words, _given):
        assert not (self.region / "driver").exists()
        self.area = apply(self.area, initialise(self.area))

    def disable_region(self, _words, _given):
        for name in self.names():
            self.detach(name)
        self.tree.bind("nd", self.region, None)

    def enable_region(self, _words, _given):
        self.tree.bind("nd", self.region, "nd_region")
        self.probe()


@pytest.fixture
def kernel(tmp_path):
    return NdKernel(tmp_path).start()


@pytest.fixture
def session(kernel):
    return Session(kernel)


def made_with(session, *, size=16 * MIB, mode="fsdax", name="one"):
    return session.do("create-namespace", "region1", mode=mode, size=size, name=name)


def fill(kernel, name, data=b"contents", offset=0):
    with kernel.device(name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


# --- creating ------------------------------------------------------------------------------------


def test_what_was_asked_for_is_what_ndctl_is_asked_for(kernel, session):
    session.do("create-namespace", "region1", mode="devdax", size=16 * MIB, map="dev", align=4096)
    (words,) = [each for each in kernel.ran if each.startswith("ndctl create")]
    uuid = session.entries[0].kept["uuid"]
    assert words == (
        "ndctl create-namespace --region region1 --no-autolabel --mode devdax "
        f"--uuid {uuid} --map dev --align 4096 --size {16 * MIB}"
    )


def test_undo_destroys_what_was_made_and_nothing_else(kernel, session):
    made_with(session)
    made_with(session, name="two")
    assert kernel.names() == ["namespace1.0", "namespace1.1"]
    session.undo()
    assert kernel.names() == ["namespace1.0"]
    assert "is gone already" in session.undo()
    session.undo(0)
    assert kernel.names() == []


def test_a_failed_creation_leaves_nothing(kernel, session):
    made_with(session)

    def half(words, given):
        kernel.create_namespace(words, given)
        raise Busy("ndctl create-namespace failed: Device or resource busy")

    kernel.handlers["ndctl create-namespace"] = half
    with pytest.raises(Busy):
        made_with(session, name="two")
    assert kernel.names() == ["namespace1.0"]
    assert session.undo() == "no namespace was made in region1"
    assert kernel.names() == ["namespace1.0"]


def test_another_size_than_was_asked_for_is_taken_back(kernel, session):
    def larger(words, given):
        words[words.index("--size") + 1] = str(32 * MIB)
        kernel.create_namespace(words, given)

    kernel.handlers["ndctl create-namespace"] = larger
    with pytest.raises(SystemFailure, match="has 33554432 bytes where 16777216 were asked for"):
        made_with(session)
    assert kernel.names() == []


def test_an_interrupted_creation_is_taken_back(kernel, session):
    def die(words, given):
        kernel.create_namespace(words, given)
        raise KeyboardInterrupt

    kernel.handlers["ndctl create-namespace"] = die
    with pytest.raises(KeyboardInterrupt):
        made_with(session)
    assert kernel.names() == ["namespace1.0"]
    assert session.undo() == "namespace1.0 is destroyed again"
    assert kernel.names() == []


def test_what_was_written_since_is_not_destroyed_without_force(kernel, session):
    made_with(session)
    fill(kernel, "namespace1.0")
    with pytest.raises(Corrupt, match=r"something was written to namespace1\.0 since it was made"):
        session.undo()
    assert kernel.names() == ["namespace1.0"]
    assert session.undo(force=True) == "namespace1.0 is destroyed again"


@pytest.mark.parametrize("name", ["-rf", "a\nb", "x" * 64, "\x00"])
def test_names_that_are_no_names(kernel, session, name):
    with pytest.raises(InvalidArgument, match="no name for a namespace"):
        made_with(session, name=name)
    assert not any("create" in each for each in kernel.ran)


def test_a_region_that_went_away(kernel, session):
    with pytest.raises(InvalidArgument, match="region7 is no region of this machine, or no longer"):
        session.do("create-namespace", "region7", mode="raw", size=MIB)
    with pytest.raises(InvalidArgument, match="is no name of a region"):
        session.do("create-namespace", "../region1", mode="raw", size=MIB)
    assert kernel.ran == []


# --- destroying and bringing back ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fsdax", "raw"])
def test_a_destroyed_namespace_comes_back_with_its_contents(kernel, session, mode):
    made_with(session, mode=mode)
    fill(kernel, "namespace1.0")
    before = kernel.device("namespace1.0").read_bytes()
    session.do("destroy-namespace", "namespace1.0")
    assert kernel.names() == []
    assert "with its contents" in session.undo()
    assert kernel.device("namespace1.0").read_bytes() == before
    assert "with its contents" in session.undo()


def test_labels_of_others_stay(kernel, session):
    made_with(session)
    made_with(session, name="two")
    session.do("destroy-namespace", "namespace1.0")
    session.do("destroy-namespace", "namespace1.0")
    made_with(session, name="elsewhere", size=16 * MIB)
    session.undo()
    session.undo(3)
    session.undo(2)
    names = [label.name.rstrip(b"\0") for label in read_area(kernel.area).labels]
    assert sorted(names) == [b"one", b"two"]


def test_space_that_another_took_since_is_not_taken_from_it(kernel, session):
    made_with(session)
    session.do("destroy-namespace", "namespace1.0")
    made_with(session, name="another")
    area = kernel.area
    with pytest.raises(Corrupt, match="has taken its space on nmem0 since; destroy that first"):
        session.undo(1)
    with pytest.raises(Corrupt):
        session.undo(1, force=True)
    assert kernel.area == area


SAMPLED = 8192 + 20 * ((16 * MIB - 8192) // 64 // 4096 * 4096)


@pytest.mark.parametrize("place", [8192, MIB, SAMPLED, 16 * MIB - 4], ids=str)
def test_contents_that_were_written_over_do_not_come_back(kernel, session, place):
    """At the start, at a page that is sampled, and at the end."""
    made_with(session)
    fill(kernel, "namespace1.0")
    session.do("destroy-namespace", "namespace1.0")
    area = kernel.area
    kernel.media[place : place + 4] = b"new!"
    with pytest.raises(Corrupt, match="was written over since, so its contents cannot come back"):
        session.undo()
    assert kernel.names() == []
    assert [label.uuid for label in read_area(kernel.area).labels] == [
        label.uuid for label in read_area(area).labels
    ]
    text = session.undo(force=True)
    assert "is back as fsdax, without its contents" in text
    assert kernel.names() == ["namespace1.0"]


def test_a_reconfigured_namespace_comes_back(kernel, session):
    made_with(session)
    fill(kernel, "namespace1.0")
    before = kernel.device("namespace1.0").read_bytes()
    session.do("reconfigure-namespace", "namespace1.0", mode="raw")
    assert len(kernel.device("namespace1.0").read_bytes()) == 16 * MIB
    assert "is back as fsdax, with its contents" in session.undo()
    assert kernel.device("namespace1.0").read_bytes() == before


def test_without_labels_only_the_info_block_comes_back(tmp_path):
    kernel = NdKernel(tmp_path).start(labels=False)
    session = Session(kernel)
    session.do("reconfigure-namespace", "namespace1.0", mode="fsdax")
    fill(kernel, "namespace1.0")
    session.do("destroy-namespace", "namespace1.0")
    assert len(kernel.device("namespace1.0").read_bytes()) == SIZE
    session.undo()
    assert kernel.device("namespace1.0").read_bytes()[:8] == b"contents"
    with pytest.raises(Corrupt):
        session.undo(0)


def test_a_failure_enables_the_namespace_again(kernel, session):
    made_with(session)
    kernel.failing["ndctl destroy-namespace .*"] = Busy("Device or resource busy")
    with pytest.raises(Busy):
        session.do("destroy-namespace", "namespace1.0")
    assert kernel.attached.keys() == {"namespace1.0"}
    assert (kernel.place("namespace1.0") / "force_raw").read_text().strip() == "0"
    assert "with its contents" in session.undo()


def test_a_failure_before_anything_was_kept(kernel, session):
    made_with(session)
    kernel.failing["write namespace1.0/force_raw 1"] = refused(errno.EBUSY)
    with pytest.raises(Busy, match=r"namespace1\.0 as raw"):
        session.do("destroy-namespace", "namespace1.0")
    kernel.failing.clear()
    assert session.undo() == "namespace1.0 was not touched"
    assert kernel.attached.keys() == {"namespace1.0"}


@pytest.mark.parametrize("verb", ["destroy-namespace", "reconfigure-namespace"])
def test_what_is_mounted_is_left_alone(kernel, session, verb):
    made_with(session)
    kernel.tree.disk("pmem1.0", "259:5")
    line = "30 1 259:5 / /data rw - ext4 /dev/pmem1.0 rw"
    kernel.tree.put(kernel.tree.proc / "self/mountinfo", line)
    count = len(kernel.ran)
    with pytest.raises(Busy, match="in use: mounted on /data"):
        session.do(verb, "namespace1.0", mode="raw")
    assert len(kernel.ran) == count


def test_another_namespace_under_the_same_name(kernel, session):
    made_with(session)
    uuid = str(UUID(int=5))
    with pytest.raises(InvalidArgument, match="it is another one by now"):
        session.do("destroy-namespace", "namespace1.0", uuid=uuid)
    assert session.do("destroy-namespace", "namespace1.7") == {}


# --- labels --------------------------------------------------------------------------------------


def test_labels_are_initialised_with_the_region_disabled(tmp_path):
    kernel = NdKernel(tmp_path).start(labels=False)
    session = Session(kernel)
    session.do("init-labels", "region1")
    programs = [each for each in kernel.ran if each.startswith("ndctl")]
    assert programs == [
        "ndctl read-labels nmem0",
        "ndctl disable-region region1",
        "ndctl init-labels --force nmem0",
        "ndctl enable-region region1",
    ]
    assert kernel.names() == []
    assert session.do("init-labels", "region1") == {}
    assert "are as they were" in session.undo(0)
    assert kernel.area == bytes(AREA)


@pytest.mark.parametrize("point", ["init-labels .*", "disable-region .*"])
def test_the_region_is_enabled_again_whatever_fails(tmp_path, point):
    kernel = NdKernel(tmp_path).start(labels=False)
    session = Session(kernel)
    kernel.failing[f"ndctl {point}"] = SystemFailure("failed")
    with pytest.raises(SystemFailure):
        session.do("init-labels", "region1")
    assert (kernel.region / "driver").exists()
    kernel.failing.clear()
    assert "are as they were" in session.undo()


def test_labels_are_not_taken_away_from_namespaces(tmp_path):
    kernel = NdKernel(tmp_path).start(labels=False)
    session = Session(kernel)
    session.do("init-labels", "region1")
    made_with(session)
    with pytest.raises(Busy, match="nmem0 has 1 labels by now"):
        session.undo(0)
    assert kernel.names() == ["namespace1.0"]


def test_a_region_without_dimms_has_no_labels(tmp_path):
    kernel = NdKernel(tmp_path).start(labels=False)
    kernel.tree.put(kernel.region / "mappings", 0)
    with pytest.raises(NotSupported, match="region1 has no dimms"):
        Session(kernel).do("init-labels", "region1")


def test_labels_that_the_kernel_does_not_use_are_not_written_over(kernel, session):
    made_with(session)
    kernel.tree.put(kernel.region / "nstype", 4)
    with pytest.raises(InvalidArgument, match="nothing is written over them"):
        session.do("init-labels", "region1")


# --- enabling ------------------------------------------------------------------------------------


def test_enable_and_disable_again(kernel, session):
    made_with(session)
    kernel.detach("namespace1.0")
    session.do("enable-namespace", "namespace1.0")
    assert "namespace1.0" in kernel.attached
    assert session.undo() == "namespace1.0 is disabled again"
    assert "namespace1.0" not in kernel.attached
    assert session.undo() == "namespace1.0 is as it was"


@pytest.mark.parametrize("verb", ["destroy-namespace", "reconfigure-namespace", "enable-namespace"])
@pytest.mark.parametrize("target", ["namespace1", "../namespace1.0", "pmem1", "namespace9.0"])
def test_targets_that_are_none(kernel, session, verb, target):
    with pytest.raises(PmemError):
        session.do(verb, target, mode="raw")
    assert kernel.ran == []


# --- what was there before -----------------------------------------------------------------------

EXT = (b"\x53\xef", 1024 + 0x38)


def signature(kernel, name):
    data = kernel.device(name).read_bytes()
    return identify(lambda offset, length: data[offset : offset + length], len(data))


def test_a_new_namespace_is_wiped_of_what_was_there_and_undo_puts_it_back(kernel, session):
    made_with(session)
    fill(kernel, "namespace1.0", *EXT)
    before = kernel.device("namespace1.0").read_bytes()
    session.do("destroy-namespace", "namespace1.0")
    made_with(session, name="another")
    assert signature(kernel, "namespace1.0") is None
    session.undo()
    assert "with its contents" in session.undo(1)
    assert kernel.device("namespace1.0").read_bytes() == before


def test_what_was_wiped_is_not_put_over_what_was_written_since(kernel, session):
    made_with(session)
    fill(kernel, "namespace1.0", *EXT)
    session.do("destroy-namespace", "namespace1.0")
    made_with(session, name="another")
    fill(kernel, "namespace1.0", b"new")
    with pytest.raises(Corrupt, match=r"something was written to namespace1\.0 since it was made"):
        session.undo()
    assert kernel.device("namespace1.0").read_bytes()[:3] == b"new"
    session.undo(force=True)
    with pytest.raises(Corrupt, match="was written over since"):
        session.undo(1)


def test_a_reconfigured_namespace_is_wiped_too(kernel, session):
    made_with(session, mode="raw")
    fill(kernel, "namespace1.0", *EXT)
    fill(kernel, "namespace1.0", EXT[0], MIB + EXT[1])
    before = kernel.device("namespace1.0").read_bytes()
    session.do("reconfigure-namespace", "namespace1.0", mode="fsdax")
    assert signature(kernel, "namespace1.0") is None
    assert "with its contents" in session.undo()
    assert kernel.device("namespace1.0").read_bytes() == before


def test_what_was_blank_comes_back_whatever_became_of_it(kernel, session):
    made_with(session, mode="raw")
    session.do("destroy-namespace", "namespace1.0")
    kernel.media[8 * MIB : 8 * MIB + 4] = b"new!"
    assert session.undo().endswith("is back as raw, which was blank")


def test_what_was_made_of_a_blank_one_is_looked_after(kernel, session):
    made_with(session, mode="raw")
    session.do("reconfigure-namespace", "namespace1.0", mode="fsdax")
    fill(kernel, "namespace1.0")
    with pytest.raises(Corrupt, match="taking that back loses it"):
        session.undo()
    assert "is back as raw, which was blank" in session.undo(force=True)


# --- after a boot --------------------------------------------------------------------------------


def renumber(kernel, session):
    """What is region 1 of nmem0 becomes region 5 of nmem3, and another takes its name."""
    devices, tree = kernel.tree.sysfs / "bus/nd/devices", kernel.tree
    place = tree.device(
        "nd",
        "platform/ndbus0/region5",
        driver="nd_region",
        size=SIZE,
        mappings=1,
        mapping0=f"nmem3,0,{SIZE},0",
        resource=hex(1 << 40),
    )
    tree.device("nd", "platform/ndbus0/nmem3", commands="get_data set_data", flags="label")
    tree.put(devices / "nmem3/nfit/id", "8680-56341200")
    tree.put(devices / "nmem0/nfit/id", "8680-57341200")
    return place


def test_an_entry_finds_its_region_by_its_dimms(kernel, session):
    devices = kernel.tree.sysfs / "bus/nd/devices"
    kernel.tree.put(devices / "nmem0/nfit/id", "8680-56341200")
    made_with(session)
    entry = session.entries[0]
    assert entry.kept["names"]["is"] == f"0,{SIZE},0 of dimm 8680-56341200"
    assert with_names_of_now(session.actions._live, entry).step.target == "region1"
    renumber(kernel, session)
    now = with_names_of_now(session.actions._live, entry)
    assert now.step.target == "region5"
    assert now.made["dev"] == "namespace5.0"
    assert now.made["blockdev"] == "pmem5.0"
    assert now.made["uuid"] == entry.made["uuid"]


def test_the_labels_of_an_entry_are_those_of_its_own_dimms(kernel, session):
    devices = kernel.tree.sysfs / "bus/nd/devices"
    kernel.tree.put(devices / "nmem0/nfit/id", "8680-56341200")
    made_with(session)
    session.do("destroy-namespace", "namespace1.0")
    renumber(kernel, session)
    now = with_names_of_now(session.actions._live, session.entries[1])
    assert now.kept["labels"].keys() == {"nmem3"}


def test_a_region_that_is_not_there_now(kernel, session):
    devices = kernel.tree.sysfs / "bus/nd/devices"
    kernel.tree.put(devices / "nmem0/nfit/id", "8680-56341200")
    made_with(session)
    kernel.tree.put(devices / "nmem0/nfit/id", "8680-57341200")
    with pytest.raises(InvalidArgument, match=r"region1 \(0,\d+,0 of dimm 8680-56341200\) is not"):
        session.undo()
    assert "stays as it is" in session.undo(force=True)
