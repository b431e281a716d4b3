"""The database: whom it lets in, what it keeps, and what it makes of a bad start."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cfiddle_cluster.commands import CommandError
from containers import Container, Start

PASSWORD = "p4ssw0rd-of-the-database"
OTHER_PASSWORD = "0ther-passw0rd-of-the-database"

Secret = Callable[[str, str], Path]


def options(password: Path, volume: str = "") -> list[str]:
    mounted = ["--volume", f"{volume}:/var/lib/mysql"] if volume else []
    return ["--volume", f"{password}:/run/secrets/database-password:ro", *mounted]


def query(database: Container, statement: str, *, user: str = "slurm", password: str = PASSWORD) -> str:
    """Ask over the network, as slurmdbd does."""
    script = (
        'MYSQL_PWD=$(cat) exec mariadb --protocol tcp --host 127.0.0.1 --user "$0" -BN slurm_acct_db --execute "$1"'
    )
    return database.run("sh", "-c", script, user, statement, input=password).strip()


@pytest.fixture(scope="module")
def database(start_for_all: Start, secret_file: Secret) -> Container:
    found = start_for_all("mysql", options=options(secret_file("database-password", PASSWORD)))
    found.wait_until_healthy()
    return found


def test_account_of_slurmdbd_has_its_database_and_no_other(database: Container) -> None:
    assert query(database, "CREATE TABLE t1 (n INT); INSERT INTO t1 VALUES (4); SELECT n * 5 FROM t1") == "20"
    with pytest.raises(CommandError, match="denied"):
        query(database, "SELECT * FROM mysql.global_priv")


@pytest.mark.parametrize(
    ("user", "password"), [("slurm", "wrong"), ("slurm", ""), ("root", ""), ("mysql", ""), ("", "")]
)
def test_nobody_else_comes_in_over_the_network(database: Container, user: str, password: str) -> None:
    with pytest.raises(CommandError, match="Access denied"):
        query(database, "SELECT 1", user=user, password=password)


def test_log_has_no_complaint_and_no_password(database: Container) -> None:
    assert database.complaints(but="Access denied for user") == []
    assert PASSWORD not in database.log()


def test_password_is_in_no_argument_and_no_environment(database: Container) -> None:
    everything = database.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'")
    assert "mariadbd" in everything
    assert PASSWORD not in everything


def test_server_is_not_root(database: Container) -> None:
    owner = database.run("sh", "-c", 'stat --format %u "/proc/$(cat /run/mysqld/mysqld.pid)"')
    assert owner.strip() == "803"


def test_dump_can_be_taken_without_a_password_from_inside(database: Container) -> None:
    query(database, "CREATE TABLE t2 (n INT)")
    assert "CREATE TABLE `t2`" in database.run("mariadb-dump", "slurm_acct_db")


def test_records_and_a_new_password_hold_in_the_next_container(start: Start, secret_file: Secret, volume: str) -> None:
    first = start("mysql", options=options(secret_file("old", PASSWORD), volume))
    first.wait_until_healthy()
    query(first, "CREATE TABLE t (n INT); INSERT INTO t VALUES (7)")
    first.stop()
    second = start("mysql", options=options(secret_file("new", OTHER_PASSWORD), volume))
    second.wait_until_healthy()
    assert query(second, "SELECT n FROM t", password=OTHER_PASSWORD) == "7"
    with pytest.raises(CommandError, match="Access denied"):
        query(second, "SELECT n FROM t", password=PASSWORD)


def test_killed_server_comes_back_with_its_records(start: Start, secret_file: Secret, volume: str) -> None:
    database = start("mysql", options=options(secret_file("database-password", PASSWORD), volume))
    database.wait_until_healthy()
    query(database, "CREATE TABLE t (n INT); INSERT INTO t VALUES (7)")
    with pytest.raises(CommandError):
        database.run("sh", "-c", 'kill -9 "$(cat /run/mysqld/mysqld.pid)"; sleep 60')
    database.restart()
    database.wait_until_healthy()
    assert query(database, "SELECT n FROM t") == "7"


def test_database_whose_making_was_interrupted_is_made_anew(start: Start, secret_file: Secret, volume: str) -> None:
    half = start("common", "sh", "-c", "install -d /v/data.new/mysql && chown -R 803:803 /v",
                 options=["--volume", f"{volume}:/v"])  # fmt: skip
    assert half.wait_until_ended() == 0
    database = start("mysql", options=options(secret_file("database-password", PASSWORD), volume))
    database.wait_until_healthy()
    assert query(database, "SELECT 1") == "1"


def test_it_does_not_start_without_a_password(start: Start) -> None:
    database = start("mysql")
    assert database.wait_until_ended() == 1
    assert "no password: the secret database-password is missing" in database.log()


@pytest.mark.parametrize("password", ["short", "'; DROP DATABASE mysql; -- -----"])
def test_password_that_could_end_a_statement_is_refused(start: Start, secret_file: Secret, password: str) -> None:
    database = start("mysql", options=options(secret_file("database-password", password)))
    assert database.wait_until_ended() == 1
    assert "must hold 16 or more letters" in database.log()
    assert password not in database.log()
