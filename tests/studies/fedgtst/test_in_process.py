"""The grid whose clients are in this process."""

from __future__ import annotations

from jacnorm.studies.fedgtst.flower_api import ClientApp, ErrorCode, Message, RecordDict, Run
from jacnorm.studies.fedgtst.in_process import InProcessGrid


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 1:
            raise ValueError("no")
        context.state["seen"] = message.content["sent"]
        return Message(message.content, reply_to=message)

    return app


def grid() -> InProcessGrid:
    return InProcessGrid(echo(), [{"partition-id": client} for client in range(3)])


def content(number: int) -> RecordDict:
    from jacnorm.studies.fedgtst.flower_api import ConfigRecord

    return RecordDict({"sent": ConfigRecord({"number": number})})


def test_answers_come_in_the_order_of_messages():
    this = grid()
    first, _, third = this.get_node_ids()
    messages = [this.create_message(content(node), "train", node, "1") for node in (third, first)]
    answers = list(this.send_and_receive(messages, timeout=0.0))
    assert [answer.content["sent"]["number"] for answer in answers] == [third, first]
    assert [answer.metadata.src_node_id for answer in answers] == [third, first]
    assert answers[0].metadata.group_id == "1"


def test_what_a_client_raises_comes_back_as_from_a_node():
    this = grid()
    node = list(this.get_node_ids())[1]
    (answer,) = this.send_and_receive([Message(content(0), node, "train")])
    assert answer.has_error()
    assert answer.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert answer.error.reason == "<class 'ValueError'>:<'no'>"
    assert answer.metadata.src_node_id == node


def test_an_answer_is_given_once():
    this = grid()
    names = list(this.push_messages([Message(content(5), next(iter(this.get_node_ids())), "train")]))
    assert len(list(this.pull_messages(names))) == 1
    assert list(this.pull_messages(names)) == []


def test_node_numbers_are_no_partition_numbers():
    assert set(grid().get_node_ids()).isdisjoint(range(3))


def test_a_run_may_be_set():
    this = grid()
    run = Run.create_empty(7)
    this.set_run(run)
    assert this.run is run
