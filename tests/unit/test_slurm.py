"""What Slurm's commands say, and what it is told."""

from typing import Any

import pytest

from cfiddle_cluster import slurm
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.slurm import Job, Node

SINFO = """\
c1|idle|none
c1|idle|none
c2|draining|cfiddle: a new version is being deployed
c3|down*|Not responding
c4|idle*|none
c5|allocated|none
c6|drained*|kept | for later
c7|mixed-|none
"""


SHOW_QOS = "sacctmgr --noheader --parsable2 show qos"
QOS = "normal|00:00:00|||5000||lease\nlease|00:00:30|01:00:00|4|5000|DenyOnLimit|\n"
LEASE = "GraceTime=30 MaxWall=01:00:00 MaxJobsPU=4 MaxSubmitJobsPU=5000 Flags=DenyOnLimit"
SHOW_CHOICE = "sacctmgr --noheader --parsable2 show association account=cfiddle user="


class Told:
    """Slurm, as far as a test needs it: answers by a command's first words, and what it was told."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.commands: list[str] = []

    def __call__(self, argv: list[str], **_: Any) -> str:
        command = " ".join(argv)
        self.commands.append(command)
        for begin, answers in self.answers.items():
            if command.startswith(begin):
                return answers.pop(0) if len(answers) > 1 else answers[0]
        return ""

    @property
    def changes(self) -> list[str]:
        looks = ("sinfo", "squeue", "sacct ", "sacctmgr --noheader")
        return [command for command in self.commands if not command.startswith(looks)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told(
        {
            "sinfo": [SINFO],
            "sacctmgr --noheader --parsable2 show cluster": ["cfiddle\n"],
            SHOW_QOS: [QOS],
            SHOW_CHOICE: ["lease,normal|normal\n"],
        }
    )
    monkeypatch.setattr(slurm, "slurm", found)
    return found


def test_nodes_are_read_with_their_state_and_whether_they_answer() -> None:
    nodes = slurm.parse_nodes(SINFO)
    assert nodes["c1"] == Node("c1", "idle", True)
    assert nodes["c2"] == Node("c2", "draining", True, "cfiddle: a new version is being deployed")
    assert not nodes["c3"].is_answering
    assert not nodes["c4"].is_answering
    assert nodes["c6"] == Node("c6", "drained", False, "kept | for later")
    assert nodes["c7"].state == "mixed"
    assert [name for name, node in nodes.items() if node.is_idle] == ["c1"]
    assert [name for name, node in nodes.items() if node.is_drained] == ["c2", "c6"]


def test_silence_of_a_node_does_not_change_why_it_was_drained() -> None:
    line = "c1|{}|cfiddle: a new version is being deployed : Not responding : Not responding\n"
    for state in ("drained*", "drained"):
        assert slurm.parse_nodes(line.format(state))["c1"].reason == "cfiddle: a new version is being deployed"
    assert slurm.parse_nodes("c1|down*|Not responding\n")["c1"].reason == "Not responding"


def test_slots_are_those_of_the_nodes_that_take_jobs(told: Told) -> None:
    told.answers["sinfo"] = ["c2 16 mixed\nc1 4 idle\nc3 4 drained\nc4 4 draining\nc5 4 down\n"]
    assert slurm.slots() == {"c1": 4, "c2": 16}


def test_jobs_are_read_without_their_names(told: Told) -> None:
    told.answers["squeue"] = ["7|ada|normal|RUNNING|0:01|c1\n8_[1-2]|ben|shared|PENDING|0:00|\n"]
    assert slurm.jobs("c1") == [
        Job("7", "ada", "normal", "RUNNING", "0:01", "c1"),
        Job("8_[1-2]", "ben", "shared", "PENDING", "0:00", ""),
    ]
    assert "--nodelist=c1" in told.commands[0]
    assert "%j" not in told.commands[0], "a user chooses a job's name, and may put a line break into it"


def test_only_what_is_drained_is_resumed(told: Told) -> None:
    slurm.resume(name for name in ("c1", "c2", "c6", "c9"))
    assert told.changes == ["scontrol update nodename=c2,c6 state=resume"]


def test_nothing_is_told_about_no_nodes(told: Told) -> None:
    slurm.drain([], "reason")
    slurm.set_down([], "reason")
    slurm.resume([])
    assert told.changes == []


def test_waits_for_jobs_and_epilogs_of_the_named_nodes_alone(told: Told) -> None:
    told.answers["sinfo"] = ["c1|draining|x\nc2|allocated|none\n", "c1|drained|x\nc2|allocated|none\n"]
    slurm.wait_until_empty(["c1"], timeout_s=5)
    assert [command.split()[0] for command in told.commands] == ["sinfo", "squeue", "sinfo"]
    with pytest.raises(ClusterError, match="c2"):
        slurm.wait_until_empty(["c2"], timeout_s=0)


def test_jobs_that_are_waited_for_are_said_once_and_again_when_they_are_others(told: Told) -> None:
    told.answers["sinfo"] = [*["c1|draining|x\n"] * 3, "c1|drained|x\n"]
    line = "{}|ada|normal|RUNNING|1:00|c1\n".format
    told.answers["squeue"] = [line(7) + line(8), line(7) + line(8), line(8)]
    said: list[str] = []
    slurm.wait_until_empty(["c1"], timeout_s=5, say=said.append)
    assert said == [f"c1 is drained, and waits for jobs: {jobs}" for jobs in ("7 (ada), 8 (ada)", "8 (ada)")]


def test_jobs_of_several_nodes_are_waited_for_in_one_sentence(told: Told) -> None:
    told.answers["sinfo"] = ["c1|draining|x\nc2|drained|x\n", "c1|drained|x\nc2|drained|x\n"]
    told.answers["squeue"] = ["7|ada|normal|RUNNING|1:00|c1\n"]
    said: list[str] = []
    slurm.wait_until_empty(["c1", "c2"], timeout_s=5, say=said.append)
    assert said == ["the workers are drained, and wait for jobs: 7 (ada)"]


def test_a_node_that_is_not_known_is_not_deleted(told: Told) -> None:
    slurm.delete_node("c9")
    assert told.changes == []
    slurm.delete_node("c3")
    assert told.changes == ["scontrol delete nodename=c3"]


def test_users_are_added_once_and_with_a_share_of_their_own(told: Told) -> None:
    told.answers["sacctmgr --noheader --parsable2 show account"] = ["root\n"]
    told.answers["sacctmgr --noheader --parsable2 show association"] = ["\nada\n"]
    slurm.ensure_users(["ada", "eve", "ben"])
    assert told.changes == [
        "sacctmgr --immediate add account cfiddle description=cfiddle organization=cfiddle",
        "sacctmgr --immediate add user ben,eve account=cfiddle fairshare=1",
    ]
    told.commands.clear()
    told.answers["sacctmgr --noheader --parsable2 show account"] = ["cfiddle\nroot\n"]
    slurm.ensure_users(["ada"])
    assert told.changes == []


def test_what_qualities_of_service_lack_is_set_and_nothing_else(told: Told) -> None:
    slurm.ensure_qos()
    assert told.changes == []

    told.answers[SHOW_QOS] = ["normal|00:00:00|||||\n"]
    told.answers[SHOW_CHOICE] = ["normal|\n"]
    slurm.ensure_qos()
    assert told.changes == [
        "sacctmgr --immediate add qos lease",
        f"sacctmgr --immediate modify qos lease set {LEASE}",
        "sacctmgr --immediate modify qos normal set Preempt=lease MaxSubmitJobsPU=5000",
        "sacctmgr --immediate modify account name=cfiddle set qos=lease,normal defaultqos=normal",
    ]


def test_a_quality_of_service_that_says_something_else_is_changed(told: Told) -> None:
    told.answers[SHOW_QOS] = [QOS.replace("|4|", "|9|")]
    slurm.ensure_qos()
    assert told.changes == [f"sacctmgr --immediate modify qos lease set {LEASE}"]


def test_one_user_has_three_quarters_of_what_all_nodes_share(told: Told) -> None:
    told.answers["sinfo"] = ["2|1000|FORCE:16|container_cpus:2\n7|3001|FORCE:16|gpu:a100:2(S:0),container_cpus:7\n"]
    slurm.ensure_share()
    limit = "MaxTRESPU=cpu=108,mem=3001,gres/container_cpus=7"
    assert told.changes == [f"sacctmgr --immediate modify qos shared set Flags=DenyOnLimit {limit}"]


def test_users_may_choose_a_quality_of_service_before_they_are_there(told: Told) -> None:
    told.answers["sacctmgr --noheader --parsable2 show account"] = ["root\n"]
    told.answers[SHOW_CHOICE] = ["normal|\n"]
    slurm.ensure_users(["ada"])
    assert [command.split()[2:4] for command in told.changes] == [
        ["add", "account"],
        ["modify", "account"],
        ["add", "user"],
    ]


def test_a_user_s_jobs_end_before_the_user_is_deleted(told: Told) -> None:
    told.answers["sacctmgr --noheader --parsable2 show association"] = ["ada\n"]
    told.answers["squeue"] = ["7\n", ""]
    slurm.delete_user("ada")
    assert told.changes == ["scancel --user=ada", "sacctmgr --immediate delete user name=ada"]
    assert [command for command in told.commands if command.startswith("squeue")] != []
    told.commands.clear()
    slurm.delete_user("nobody-here")
    assert told.changes == []


def test_without_a_controller_the_error_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "container", lambda _service: None)
    with pytest.raises(ClusterError, match=r"slurmctld does not run.*\n.*invoke logs slurmctld"):
        slurm.slurm(["sinfo"])
    assert not slurm.is_answering()
