"""Reading the user's files: plain and conversational rows, and what is refused."""

import json

import pytest

from rlhf_fast.data import (
    load_conversations,
    load_demonstrations,
    load_preference_pairs,
    load_prompts,
    load_scored_texts,
)
from rlhf_fast.errors import UserError

USER = {"role": "user", "content": "hello"}


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def answer(text):
    return {"role": "assistant", "content": text}


def test_prompts_keep_ids_other_fields_and_system_messages(tmp_path):
    source = write(
        tmp_path,
        {"id": 7, "prompt": "a", "topic": "x"},
        {"messages": [{"role": "system", "content": "own"}, USER]},
    )
    first, second = load_prompts(source, system_prompt="be brief")
    assert (first.id, first.metadata) == ("7", {"topic": "x"})
    assert [m["content"] for m in first.messages] == ["be brief", "a"]
    assert [m["content"] for m in second.messages] == ["own", "hello"]


def test_parquet_csv_and_json_read_the_same(tmp_path):
    import datasets

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_csv(tmp_path / "rows.csv")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    expected = load_prompts(write(tmp_path, *rows))
    for name in ("rows.parquet", "rows.csv", "rows.json", "saved"):
        assert load_prompts(str(tmp_path / name)) == expected


def test_demonstrations_in_both_forms(tmp_path):
    source = write(
        tmp_path, {"prompt": "hello", "completion": "hi"}, {"messages": [USER, answer("hi")]}
    )
    first, second = load_demonstrations(source)
    assert first.response == second.response == "hi"
    assert first.prompt.messages == second.prompt.messages == [USER]


def test_pairs_with_explicit_and_implicit_prompt(tmp_path):
    source = write(
        tmp_path,
        {"prompt": "hello", "chosen": "good", "rejected": ""},
        {"prompt": [USER], "chosen": [answer("good")], "rejected": [answer("")]},
        {"chosen": [USER, answer("good")], "rejected": [USER, answer("")]},
    )
    for pair in load_preference_pairs(source):
        assert pair.prompt.messages == [USER]
        assert (pair.chosen, pair.rejected) == ("good", "")


TALK = "\n\nHuman: hello\n\nAssistant: hi\nHuman: is a word\n\nHuman: and?\n\nAssistant:"


def test_pairs_of_transcripts(tmp_path):
    messages = [USER, answer("hi\nHuman: is a word"), {"role": "user", "content": "and?"}]
    source = write(
        tmp_path,
        {"chosen": f"{TALK} good\n\nso", "rejected": f"{TALK}"},
        {"chosen": f"{TALK} good\n\nso".strip(), "rejected": f"{TALK}\n".lstrip()},
        {"prompt": TALK, "chosen": "good\n\nso", "rejected": ""},
    )
    for pair in load_preference_pairs(source):
        assert pair.prompt.messages == messages
        assert (pair.chosen, pair.rejected) == ("good\n\nso", "")
    own = "Human: a\n\nAssistant: b"  # text of a response, where the row has a prompt
    (pair,) = load_preference_pairs(write(tmp_path, {"prompt": own, "chosen": own, "rejected": ""}))
    assert pair.prompt.messages == [{"role": "user", "content": own}] and pair.chosen == own
    prompts = load_prompts(write(tmp_path, {"prompt": TALK}))
    assert prompts[0].messages == messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": f"{TALK} a\n\nHuman: b", "rejected": f"{TALK} c"}, "must end with the assist"),
        ({"chosen": f"{TALK} a", "rejected": f"\n\nHuman: b{TALK} c"}, "the same beginning"),
        ({"chosen": f"{TALK} a", "rejected": "b"}, "the same beginning"),
        ({"chosen": "Assistant: a", "rejected": "Assistant: b"}, "field `prompt` is missing"),
        ({"prompt": "a", "chosen": "b"}, "field `rejected` is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "`rejected` must be text, got 3"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same: 'b'"),
        ({"chosen": "b", "rejected": "c"}, "field `prompt` is missing"),
    ],
)
def test_bad_pairs(row, message, tmp_path):
    with pytest.raises(UserError) as error:
        load_preference_pairs(write(tmp_path, row))
    assert "rows.jsonl, row 1" in str(error.value) and message in str(error.value)


def test_fields_that_no_file_of_the_run_can_hold_are_refused_before_any_work(tmp_path):
    import datetime

    import datasets

    rows = [{"prompt": "a", "asked": datetime.datetime(2024, 5, 1)}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="row 1: field `asked` must be JSON, got datetime"):
        load_prompts(str(tmp_path / "rows.parquet"))


def test_half_a_character_is_refused(tmp_path):
    message = "row 1: `prompt` holds half a character"
    for prompt in ("cut \ud83d", [{"role": "user", "content": "cut \ud83d"}]):
        with pytest.raises(UserError, match=message):
            load_prompts(write(tmp_path, {"prompt": prompt}))
    with pytest.raises(UserError, match="row 1: `chosen` holds half a character"):
        load_preference_pairs(write(tmp_path, {"prompt": "a", "chosen": "\ud83d", "rejected": ""}))
    whole = "\U0001f600 e\u0301 \u202e مرحبا \x00 end"
    (prompt,) = load_prompts(write(tmp_path, {"prompt": whole, "note": "cut \ud83d"}))
    assert prompt.messages[0]["content"] == whole


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_must_be_finite(tmp_path, number):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for fields in ({"margin": number}, {"score_chosen": number, "score_rejected": 0.0}):
        with pytest.raises(UserError, match="must be a finite number, got"):
            load_preference_pairs(write(tmp_path, pair | fields))
    with pytest.raises(UserError, match="`score` must be a finite number, got"):
        load_scored_texts(write(tmp_path, {"prompt": "a", "response": "b", "score": number}))


def test_an_id_of_null_is_none(tmp_path):
    rows = [{"prompt": "a", "id": None}, {"prompt": "b", "id": "x"}, {"prompt": "c", "id": None}]
    assert [p.id for p in load_prompts(write(tmp_path, *rows))] == ["0", "x", "2"]


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows), "utf-8-sig")
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8-sig")
    (tmp_path / "rows.csv").write_text("prompt\na\nb\n", "utf-8-sig")
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        assert [p.messages[0]["content"] for p in load_prompts(str(tmp_path / name))] == ["a", "b"]


def test_words_of_a_csv_stay_words(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,answer\nNone,NA\nnull,\n")
    first, second = load_prompts(str(tmp_path / "rows.csv"))
    assert (first.messages[0]["content"], first.metadata) == ("None", {"answer": "NA"})
    assert (second.messages[0]["content"], second.metadata) == ("null", {"answer": None})


def test_a_directory_holds_splits_or_files(tmp_path):
    import datasets

    train, test = (datasets.Dataset.from_list([{"prompt": text}]) for text in "ab")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, split in (("train", train), ("test", test)):
        split.to_parquet(tmp_path / "files" / f"{name}.parquet")
    for name in ("saved", "files"):
        for split, text in (("", "a"), (":train", "a"), (":test", "b")):
            (prompt,) = load_prompts(f"{tmp_path / name}{split}")
            assert prompt.messages[0]["content"] == text
    with pytest.raises(UserError, match="no split 'dev'; give .*saved:SPLIT, of .'test', 'train'."):
        load_prompts(f"{tmp_path / 'saved'}:dev")


TURNS = [USER, answer("hi")]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "hello", "prompt_id": "x", "messages": TURNS}, "hello"),  # UltraChat
        ({"conversations": SHAREGPT}, "hello"),
        ({"instruction": "hello", "output": "hi"}, "hello"),  # Alpaca
        ({"instruction": "hello", "input": " ", "output": "hi"}, "hello"),
        ({"instruction": "Translate.", "input": "hello", "output": "hi"}, "Translate.\n\nhello"),
    ],
)
def test_published_forms_of_conversations(row, question, tmp_path):
    source = write(tmp_path, row)
    (demonstration,), (conversation,) = load_demonstrations(source), load_conversations(source)
    assert demonstration.prompt.messages == [{"role": "user", "content": question}]
    assert demonstration.response == "hi"
    assert conversation.messages == [*demonstration.prompt.messages, answer("hi")]


def test_the_input_of_an_instruction_is_part_of_the_prompt(tmp_path):
    row = {"instruction": "Translate.", "input": "hello", "chosen": "salut", "rejected": "hi"}
    source = write(tmp_path, row)
    (pair,), (prompt,) = load_preference_pairs(source), load_prompts(source)
    assert pair.prompt.messages == prompt.messages
    assert prompt.messages == [{"role": "user", "content": "Translate.\n\nhello"}]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "rows.json", "one object per line is .jsonl"),
        ('{"question": "a"}\n', "rows.jsonl", "rename one, or name a module:function"),
        ("prompt\ncaf\xe9\n", "rows.csv", "rows.csv.*'utf-8' codec can't decode byte"),
    ],
)
def test_refusals_say_what_to_do(content, name, message, tmp_path):
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(UserError, match=message):
        load_prompts(str(tmp_path / name))


def test_what_the_users_rows_raise_is_told_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text("def rows():\n    yield {'prompt': 'a'}\n    1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"raised ZeroDivisionError: .*my_rows.py, line 3"):
        load_prompts("my_rows:rows")


CONTEXT = [{"role": "system", "content": "brief"}, USER]


def test_a_conversation_before_the_response_is_not_cut_to_its_prompt(tmp_path):
    talk = [*CONTEXT, answer("hi"), {"role": "user", "content": "and?"}]
    rows = (
        {"prompt": "and? ", "chosen": [*talk, answer("good")], "rejected": [*talk, answer("")]},
        {"prompt": CONTEXT, "chosen": [USER, answer("good")], "rejected": [USER, answer("")]},
    )
    pairs = load_preference_pairs(write(tmp_path, *rows))
    assert [pair.prompt.messages for pair in pairs] == [talk, CONTEXT]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [USER, answer("a"), USER], "rejected": [USER, answer("b")]}, "must end with"),
        (
            {"prompt": "x", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
            "must contain `prompt` before the response, got 'hello'",
        ),
        (
            {"prompt": "hello", "chosen": [*CONTEXT, answer("a")], "rejected": [USER, answer("b")]},
            "the same beginning",
        ),
        ({"prompt": [USER, answer("a")], "chosen": "b", "rejected": "c"}, "a prompt must not end"),
    ],
)
def test_pairs_whose_messages_contradict_each_other(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_preference_pairs(write(tmp_path, row))


def test_rows_with_a_prompt_beside_their_conversation(tmp_path):
    """As UltraChat's, whose `prompt` is the first message."""
    talk = [USER, answer("hi"), {"role": "user", "content": "and?"}, answer("good")]
    source = write(tmp_path, {"prompt": "hello", "prompt_id": "1", "messages": talk})
    (demonstration,) = load_demonstrations(source)
    assert (demonstration.prompt.messages, demonstration.response) == (talk[:-1], "good")
    (conversation,) = load_conversations(source)
    assert conversation.messages == talk
