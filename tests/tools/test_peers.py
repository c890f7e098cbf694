"""The table of peers: complete for its users, and silent about nothing that is missing."""

import sys

import pytest

peers = sys.modules["peers"]


def test_every_entry_says_what_is_left_out():
    for peer in peers.PEERS:
        assert peer.package and peer.without and peer.users <= {"demo", "test", "bench", "guest"}
        assert peer.name in peers.reason(peer.name)
        assert peer.package in peers.reason(peer.name)


def test_names_are_distinct():
    assert len({peer.name for peer in peers.PEERS}) == len(peers.PEERS)


def test_a_name_outside_the_table_is_a_mistake_of_the_test():
    with pytest.raises(KeyError, match="no-such-program"):
        peers.reason("no-such-program")


def test_without_root_nothing_is_installed_and_the_rest_is_named(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find", lambda name: None if name == "fio" else name)
    monkeypatch.setattr(peers.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(peers, "_apt", lambda arguments: pytest.fail(f"apt-get {arguments}"))
    assert peers.main(["install", "--for", "test"]) == 0
    output = capsys.readouterr().out
    assert "1 programs are missing and are not installed" in output
    assert "left out: verified random load" in output and "fio" in output


def test_a_failing_install_goes_on_package_by_package(monkeypatch):
    calls = []

    def apt(arguments):
        calls.append(arguments)
        return len(arguments) == 2 and arguments[1] == "fio"

    monkeypatch.setattr(peers, "find", lambda name: None if name in ("fio", "nbdkit") else name)
    monkeypatch.setattr(peers.os, "geteuid", lambda: 0)
    monkeypatch.setattr(peers.shutil, "which", lambda name, path=None: "/usr/bin/" + name)
    monkeypatch.setattr(peers, "_apt", apt)
    missing = peers.install("bench")
    assert [peer.name for peer in missing] == ["nbdkit", "fio"]
    assert calls == [
        ["update"],
        ["install", "fio", "nbdkit"],
        ["install", "fio"],
        ["install", "nbdkit"],
    ]
