"""The plain engine: client after client without mapping, to be read beside the paper and compared with the other."""

from __future__ import annotations

from jacnorm.studies.fedgtst.algorithm import Tensors
from jacnorm.studies.fedgtst.engine import Engine, Jobs, stacked, taken


class LoopEngine(Engine):
    """As `engine.Engine`, one client at a time."""

    def _survey(self, messages: Tensors, jobs: Jobs) -> Tensors:
        replies = []
        for job in range(len(jobs)):
            run, client, place = jobs.pair(job)
            replies.append(self.strategies[run].survey(taken(messages, place), *self.data.of(run, client)))
        return stacked(replies)

    def _train(self, messages: Tensors, memories: Tensors, jobs: Jobs) -> tuple[Tensors, Tensors]:
        replies, kept = [], []
        for job in range(len(jobs)):
            run, client, place = jobs.pair(job)
            message, memory, draws = taken(messages, place), taken(memories, job), taken(jobs.draws, job)
            x, y = self.data.of(run, client)
            reply, memory = self.strategies[run].client(message, memory, x, y, draws, extra=bool(jobs.extra[job]))
            replies.append(reply)
            kept.append(memory)
        return stacked(replies), stacked(kept)
