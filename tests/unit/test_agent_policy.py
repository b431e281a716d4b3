"""The policy: all that is wrong with one is said before the first call."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.policy import Mount, Policy, PolicyError, load, parse

ROOT = Path(__file__).parents[2]
LIMITS = {
    "seconds": 10,
    "memory_mb": 256,
    "processes": 64,
    "cpus": "job",
    "open_files": 256,
    "file_mb": 16,
    "tmpfs_mb": 64,
    "tmpfs_files": 1000,
    "output_mb": 4,
}


def _document(limits: dict[str, Any] | None = None, **profile: Any) -> dict[str, Any]:
    entry = {"command": ["python3"], "limits": {**LIMITS, **(limits or {})}, **profile}
    return {"version": 1, "calls": {"at_once": 4, "per_user": 2}, "profiles": {"default": entry}}


def _parse(document: Any) -> Policy:
    return parse(yaml.safe_dump(document).encode(), images={"cfiddle-sandbox": "cfiddle-sandbox:1"})


def test_the_policy_of_this_checkout_is_valid() -> None:
    policy = load(
        ROOT / "policy.yaml", images={"cfiddle-sandbox": "cfiddle-sandbox:1", "cfiddle-compiler": "cfiddle-compiler:2"}
    )
    assert list(policy.profiles) == ["default", "build"]
    assert policy.profiles["default"].image == "cfiddle-sandbox:1"
    assert policy.profiles["default"].command[3] == "delegate_function.inside"
    assert policy.profiles["default"].pool > 0
    assert policy.profiles["default"].mounts == ()
    assert policy.profiles["build"].image == "cfiddle-compiler:2"


def test_image_is_the_cluster_s_own_by_name_or_another_by_reference() -> None:
    def image(**profile: str) -> str:
        content = yaml.safe_dump(_document(**profile)).encode()
        return parse(content, images={"cfiddle-sandbox": "s:1", "cfiddle-compiler": "c:1"}).profiles["default"].image

    assert image() == image(image="cfiddle-sandbox") == "s:1"
    assert image(image="cfiddle-compiler") == "c:1"
    assert image(image="cfiddle-compiler:1") == "cfiddle-compiler:1"


def test_a_request_lowers_limits_and_raises_none() -> None:
    limits = _parse(_document()).profiles["default"].limits
    assert (limits.lowered(5, 100).seconds, limits.lowered(5, 100).memory_mb) == (5, 100)
    assert limits.lowered(1000, 100000) == limits
    assert limits.lowered(None, None) == limits


def test_cpus_are_the_job_s_or_the_policy_s() -> None:
    assert _parse(_document()).profiles["default"].limits.cpus_in("2-3") == "2-3"
    assert _parse(_document({"cpus": "0-1,4"})).profiles["default"].limits.cpus_in("2-3") == "0-1,4"
    assert _parse(_document({"cpus": 1})).profiles["default"].limits.cpus_in("") == "1"


@pytest.mark.parametrize("place", ["", "calls", "profiles.default", "profiles.default.limits"])
def test_unknown_key_is_named_with_its_place(place: str) -> None:
    document = _document()
    entry = document
    for name in filter(None, place.split(".")):
        entry = entry[name]
    entry["privileged"] = True
    with pytest.raises(PolicyError, match=f"{place or 'the file'}: unknown key 'privileged'; known: "):
        _parse(document)


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_missing_limit_is_named(name: str) -> None:
    document = _document()
    del document["profiles"]["default"]["limits"][name]
    with pytest.raises(PolicyError, match=f"profiles.default.limits: {name} is missing"):
        _parse(document)


@pytest.mark.parametrize("name", sorted(set(LIMITS) - {"cpus"}))
@pytest.mark.parametrize("value", [0, -1, "10", None, True, 1 << 40, float("inf"), float("nan"), [1]])
def test_limit_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(PolicyError, match=f"profiles.default.limits.{name} is "):
        _parse(_document({name: value}))


@pytest.mark.parametrize("cpus", ["all", "", "0-", "0;1", "0,,1", None, 1.5, "-1"])
def test_cpus_that_are_no_list_are_refused(cpus: object) -> None:
    with pytest.raises(PolicyError, match=r"limits\.cpus is"):
        _parse(_document({"cpus": cpus}))


@pytest.mark.parametrize("image", ["", "--privileged", "a b", "a\nb", 5, None, "../x"])
def test_what_is_no_image_is_refused(image: object) -> None:
    with pytest.raises(PolicyError, match="image is"):
        _parse(_document(image=image))


def test_a_profile_has_nothing_that_is_not_given() -> None:
    profile = _parse(_document()).profiles["default"]
    assert (profile.pool, profile.counters, profile.mounts) == (0, False, ())
    given = _parse(_document(pool=3, counters=True, network="none", mounts=[{"source": "/srv/a", "target": "/data"}]))
    profile = given.profiles["default"]
    assert (profile.pool, profile.counters, profile.mounts) == (3, True, (Mount("/srv/a", "/data"),))


@pytest.mark.parametrize("pool", [-1, 257, 1.5, "4", True, None])
def test_pool_out_of_range_is_named(pool: object) -> None:
    with pytest.raises(PolicyError, match=r"profiles\.default\.pool is"):
        _parse(_document(pool=pool))


@pytest.mark.parametrize("counters", [0, 1, "true", None, []])
def test_counters_are_there_or_not(counters: object) -> None:
    with pytest.raises(PolicyError, match=r"profiles\.default\.counters is .*, neither true nor false"):
        _parse(_document(counters=counters))


@pytest.mark.parametrize("network", ["bridge", "host", None, True, ""])
def test_there_is_no_network(network: object) -> None:
    with pytest.raises(PolicyError, match=r"profiles\.default\.network is .*; a sandbox has none"):
        _parse(_document(network=network))


@pytest.mark.parametrize(
    "path",
    ["data", "", "/srv/../etc", "/srv/", "/srv//a", "//srv", "/srv/.", "/srv/a\nb", "/srv/a\0b", None, 5, ["/srv"]],
)
@pytest.mark.parametrize("end", ["source", "target"])
def test_a_mount_s_paths_are_absolute_and_plain(end: str, path: object) -> None:
    mount = {"source": "/srv/a", "target": "/data", end: path}
    with pytest.raises(PolicyError, match=rf"profiles.default.mounts\[0\].{end} is"):
        _parse(_document(mounts=[mount]))


@pytest.mark.parametrize(
    "source",
    [
        *("/", "/var", "/var/run", "/var/run/docker.sock", "/run", "/run/docker.sock", "/run/cfiddle-grants", "/proc"),
        *(
            "/proc/1",
            "/sys/fs/cgroup",
            "/dev",
            "/dev/shm",
            "/var/lib",
            "/var/lib/docker/volumes/x",
            "/var/lib/containerd",
        ),
    ],
)
def test_what_gives_the_machine_away_is_no_source(source: str) -> None:
    with pytest.raises(PolicyError, match=r"mounts\[0\].source is .*cannot be mounted"):
        _parse(_document(mounts=[{"source": source, "target": "/data"}]))


@pytest.mark.parametrize("target", ["/", "/tmp", "/tmp/a", "/proc/self", "/sys", "/dev/shm", "/run/cfiddle", "/run"])
def test_what_a_sandbox_has_already_is_no_target(target: str) -> None:
    with pytest.raises(PolicyError, match=r"mounts\[0\].target is .*cannot be mounted"):
        _parse(_document(mounts=[{"source": "/srv/a", "target": target}]))


@pytest.mark.parametrize("target", ["/data", "/data/deeper"])
def test_no_mount_lies_in_another(target: str) -> None:
    mounts = [{"source": "/srv/a", "target": "/data"}, {"source": "/srv/b", "target": target}]
    with pytest.raises(PolicyError, match=r"mounts\[1\].target .* another mount's"):
        _parse(_document(mounts=mounts))
    mounts[1]["target"] = "/database"
    assert len(_parse(_document(mounts=mounts)).profiles["default"].mounts) == 2


@pytest.mark.parametrize("mounts", [{}, "x", [5], [{"source": "/srv/a"}], [{"source": "/a", "target": "/b", "rw": 1}]])
def test_what_is_no_list_of_mounts_is_refused(mounts: object) -> None:
    with pytest.raises(PolicyError, match=r"profiles.default.mounts"):
        _parse(_document(mounts=mounts))


@pytest.mark.parametrize("command", [[], "python3 -I", ["a", 1], [""], None])
def test_command_is_a_list_of_words(command: object) -> None:
    with pytest.raises(PolicyError, match="command must be a list of words"):
        _parse(_document(command=command))


@pytest.mark.parametrize("name", ["Default", "-x", "a/b", "a" * 33, 5, "a\n"])
def test_profile_s_name_is_plain(name: object) -> None:
    document = _document()
    document["profiles"] = {name: document["profiles"]["default"]}
    with pytest.raises(PolicyError, match="a name has up to 32"):
        _parse(document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "version: 1",
        "a: &a [*a]",
        "&a {b: *a}",
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system ''",
        "a: 1\na: 2",
        "version: 1\ncalls: {at_once: 1, at_once: 9, per_user: 1}\nprofiles: {}",
        "? [a]\n: 1",
        "\tno",
        "version: 2\ncalls: {at_once: 1, per_user: 1}\nprofiles: {default: {}}",
        "version: true\ncalls: {at_once: 1, per_user: 1}\nprofiles: {default: {}}",
        "version: 1\ncalls: {at_once: 1, per_user: 1}\nprofiles: {}",
        "version: 1\ncalls: {at_once: 1, per_user: 1}\nprofiles: {default: {}}",
        "a: " + "[" * 5000,
        "# " + "x" * 70000,
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]",
    ],
)
def test_what_is_no_policy_is_one_error(text: str) -> None:
    with pytest.raises(PolicyError):
        parse(text.encode(), images={})


def test_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"policy\.yaml: No such file"):
        load(tmp_path / "policy.yaml", images={})
