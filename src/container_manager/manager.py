"""The verbs: create, delete, stop and run, over any place, with the messages that they are known by."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from container_manager import interrupts, names
from container_manager.errors import ContainerError, Refusal
from container_manager.place import Container, Place

MOST_AT_ONCE = 100
"""So many containers does one `create` make at most."""


class Manager:
    """A user's containers in one place."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def create(self, number: int) -> list[Container]:
        """Create so many containers with the lowest free names; return them in the order of their names.

        What ends it early, be it Ctrl-C, leaves none of them.
        """
        with self.place.naming():
            new = names.next_names({container.name for container in self.place.containers()}, number)
            try:
                self.place.create(new)
                return self._named(new)
            except BaseException:
                with interrupts.put_off():
                    self.discard([container for container in self.place.containers() if container.name in new])
                raise

    def delete(self, name: str | None = None) -> list[str]:
        """Delete one, or all that do not run; return the names of those that are gone."""
        if name is None:
            idle = [container for container in self.place.containers() if not container.is_running]
            self.place.delete(idle)
            return [container.name for container in idle]
        container = self._find(name, "no container names {}")
        if container.is_running:
            raise Refusal(f"container {name} is running, please stop it before delete it!")
        self.place.delete([container])
        return [name]

    def stop(self, name: str | None = None) -> list[str]:
        """Stop one, or all that run; return the names of those that were stopped."""
        if name is None:
            running = [container for container in self.place.containers() if container.is_running]
            self.place.stop(running)
            return [container.name for container in running]
        container = self._find(name, "no container names {}")
        if not container.is_running:
            raise Refusal(f"container {name} is not running")
        self.place.stop([container])
        return [name]

    def ready(self, name: str | None = None) -> Container:
        """Return one that runs, started if need be; or a new one, which goes on running after its command."""
        if name is None:
            with self.new(1) as [container]:
                self.place.start([container])
                return container
        container = self._find(name, "no container name {}")
        self.place.start([container])
        return container

    @contextmanager
    def new(self, number: int) -> Iterator[list[Container]]:
        """Create so many for a block; if it does not come to its end, none of them is left."""
        containers = self.create(number)
        try:
            yield containers
        except BaseException:
            with interrupts.put_off():
                self.discard(containers)
            raise

    def discard(self, containers: list[Container]) -> None:
        """Stop and delete containers, whether they run or not."""
        self.place.stop(containers)
        self.place.delete(containers)

    def _find(self, name: str, refusal: str) -> Container:
        names.check(name)
        found = next((container for container in self.place.containers() if container.name == name), None)
        if found is None:
            raise Refusal(refusal.format(name))
        return found

    def _named(self, wanted: Sequence[str]) -> list[Container]:
        found = {container.name: container for container in self.place.containers()}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ContainerError(f"removed while it was made: {', '.join(missing)}")
        return [found[name] for name in wanted]
