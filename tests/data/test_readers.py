"""Readers: every record shape and file kind, and every fault named with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from compact_fast.data import Question, Rationale, read_questions, select_teachers, teachers_of

GOOD: dict[str, Any] = {
    "id": "a",
    "question": "48 / 2?",
    "answer": "24",
    "rationales": [
        {"teacher": "gpt", "text": "48 / 2 = 24. The answer is 24."},
        {"teacher": "gemini", "text": "The answer is 25.", "extra": [1]},
    ],
    "unknown": {"column": None},
}


def jsonl(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_native_record(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD)
    (question,) = read_questions(path)
    assert question == Question(
        "a",
        "48 / 2?",
        "24",
        [
            Rationale("gpt", "48 / 2 = 24. The answer is 24.", "24", True),
            Rationale("gemini", "The answer is 25.", "25", False),
        ],
        source=f"{path}:1",
    )


def test_flags_of_the_file_win_over_extraction(tmp_path: Path) -> None:
    rationales = [
        {"teacher": "a", "text": "Hm.", "answer": "24"},
        {"teacher": "b", "text": "The answer is 24.", "answer": None, "correct": False},
        {"teacher": "c", "text": "Hm, no idea"},
        {"teacher": "d", "text": "The answer is 25.", "answer": 24.0, "correct": 1},
    ]
    (question,) = read_questions(jsonl(tmp_path, {**GOOD, "rationales": rationales}))
    assert [(r.answer, r.correct) for r in question.rationales] == [
        ("24", True),
        (None, False),
        (None, None),
        ("24", True),
    ]


AUTHORS = [
    {
        "Question": "16 eggs, 7 used, $2 each?",
        "CoT": ["9 * 2 = 18", "16 * 2 = 32"],
        "Answer": "16 - 7 = <<16-7=9>>9 eggs are left.\n9 * 2 = $18.\n#### 18",
    },
    {"Question": "1 + 1?", "CoT": ["2"], "Answer": 2},
]
ROWS = [
    {"prompt": "48 / 2?", "teacher": "gpt", "completion": "24", "answer": "24"},
    {"prompt": "1 + 1?", "teacher": "gpt", "completion": "2", "answer": 2},
    {"prompt": "48 / 2?", "teacher": "gemini", "completion": "25", "answer": "24.0"},
]
LISTS = [
    {
        "messages": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "48 / 2?"}],
        "completions": ["24", [{"role": "assistant", "content": "25"}]],
        "teachers": ["gpt", "gemini"],
        "answer": "24",
    },
    {"prompt": "1 + 1?", "completions": ["2"], "teachers": ["gpt"], "answer": "2"},
]


def check_authors(questions: list[Question]) -> None:
    assert [(q.id, q.question, q.answer) for q in questions] == [
        ("q0", "16 eggs, 7 used, $2 each?", "18"),
        ("q1", "1 + 1?", "2"),
    ]
    assert teachers_of(questions) == ["teacher-1", "teacher-2"]
    assert [r.correct for r in questions[0].rationales] == [True, False]


def check_pairs(questions: list[Question]) -> None:
    assert [(q.question, q.answer) for q in questions] == [("48 / 2?", "24"), ("1 + 1?", "2")]
    assert [[(r.teacher, r.text, r.correct) for r in q.rationales] for q in questions] == [
        [("gpt", "24", True), ("gemini", "25", False)],
        [("gpt", "2", True)],
    ]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_authors_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = json.dumps(AUTHORS) if name == "data.json" else "\n".join(map(json.dumps, AUTHORS))
    path.write_text(text)
    check_authors(read_questions(path))


def test_one_row_a_completion(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *ROWS)
    check_pairs(read_questions(path))
    assert [q.question for q in read_questions(path, limit=1)] == ["48 / 2?"]
    assert len(read_questions(path, limit=1)[0].rationales) == 2


def test_lists_of_completions(tmp_path: Path) -> None:
    questions = read_questions(jsonl(tmp_path, *LISTS))
    check_pairs(questions)
    assert questions[0].messages == LISTS[0]["messages"]


def test_conversational_prompt(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "48 / 2?"}]
    (question,) = read_questions(jsonl(tmp_path, {**ROWS[0], "prompt": prompt}))
    assert question.messages == prompt
    assert question.question == "48 / 2?"


def test_csv_cells_hold_json_where_lists_belong(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "rationales", "choices"])
        writer.writerow(["48 / 2?\nHm?", "24", json.dumps(GOOD["rationales"]), ""])
    (question,) = read_questions(path)
    assert question.question == "48 / 2?\nHm?"
    assert question.choices is None
    assert [r.correct for r in question.rationales] == [True, False]
    assert question.source == f"{path}:row 1"


def test_csv_and_tsv_rows_of_completions(tmp_path: Path) -> None:
    for name, delimiter in (("data.csv", ","), ("data.tsv", "\t")):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        check_pairs(read_questions(path))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    row = {k: v for k, v in GOOD.items() if k != "unknown"}
    row["rationales"] = [{k: r[k] for k in ("teacher", "text")} for r in row["rationales"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (question,) = read_questions(path)
    assert [r.correct for r in question.rationales] == [True, False]
    assert question.source == f"{path}:row 1"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"data.parquet: cannot be read as parquet"):
        read_questions(path)


@pytest.mark.parametrize("form", ["dataset", "splits", "files"])
def test_dataset_folders(tmp_path: Path, form: str) -> None:
    import datasets

    data = datasets.Dataset.from_list(AUTHORS[:1])
    if form == "dataset":
        data.save_to_disk(str(tmp_path))
    elif form == "splits":
        datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path))
    else:
        (tmp_path / "train.jsonl").write_text(json.dumps(AUTHORS[0]) + "\n")
    (question,) = read_questions(tmp_path)
    assert question.answer == "18"
    assert question.source == f"{tmp_path}[train]:row 1"
    if form == "splits":
        with pytest.raises(ValueError, match="no split 'test'; there is train"):
            read_questions(tmp_path, split="test")


def test_structures_of_sequences_from_datasets(tmp_path: Path) -> None:
    rationales = {"teacher": ["a", "b"], "text": ["24", "25"]}
    (question,) = read_questions(jsonl(tmp_path, {**GOOD, "rationales": rationales}))
    assert [(r.teacher, r.correct) for r in question.rationales] == [("a", True), ("b", False)]


def test_hub_datasets_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list(AUTHORS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (question,) = read_questions("owner/name:main", split="test")
    assert asked == [(("owner/name", "main"), {"split": "test"})]
    assert question.source == "owner/name:main[test]:row 1"

    def fail(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"no such file.*hub \(ConnectionError: no network"):
        read_questions("owner/name")


def test_options_name_the_gold_answer(tmp_path: Path) -> None:
    choices = ["rocks", "the sun"]
    rows = [
        {**GOOD, "id": i, "choices": choices, "answer": a}
        for i, a in enumerate(("B", "b)", "The sun"))
    ]
    rows.append({**GOOD, "id": 9, "choices": ["True", "False"], "answer": True})
    rows.append(
        {**GOOD, "id": 10, "choices": {"text": choices, "label": ["A", "B"]}, "answer": "B"}
    )
    questions = read_questions(jsonl(tmp_path, *rows))
    assert [q.answer for q in questions] == ["B", "B", "B", "True", "B"]
    assert [q.id for q in questions] == ["0", "1", "2", "9", "10"]


def test_evaluation_files_need_no_rationales(tmp_path: Path) -> None:
    bare = {k: GOOD[k] for k in ("question", "answer")}
    path = jsonl(tmp_path, bare, {"prompt": "1 + 1?", "answer": "2"}, GOOD)
    questions = read_questions(path, need_rationales=False)
    assert [len(q.rationales) for q in questions] == [0, 0, 2]
    with pytest.raises(ValueError, match=r"data.jsonl:1:rationales: is missing"):
        read_questions(path)


def test_ids_are_given_without_meeting_those_of_the_file(tmp_path: Path) -> None:
    bare = {k: v for k, v in GOOD.items() if k != "id"}
    questions = read_questions(jsonl(tmp_path, bare, {**GOOD, "id": "q0"}, bare))
    assert [q.id for q in questions] == ["_q0", "q0", "q2"]


# ---- faults ------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def texts(*values: Any) -> list[dict[str, Any]]:
    return [{"teacher": f"t{i}", "text": v} for i, v in enumerate(values)]


FAULTS: list[tuple[Any, str]] = [
    ({k: v for k, v in GOOD.items() if k != "answer"}, "answer: is missing"),
    (
        {("answr" if k == "answer" else k): v for k, v in GOOD.items()},
        "answer: is missing; did you mean 'answr' for it?",
    ),
    (changed(answer=None), "answer: is missing"),
    (changed(answer=float("nan")), "answer: is NaN, expected text"),
    (changed(answer=["24"]), "answer: expected text, got a list"),
    (changed(answer="  "), "answer: is empty"),
    (changed(answer="work ####"), 'answer: nothing follows "####"'),
    (changed(question=5), "question: expected text, got the number 5"),
    (changed(question=""), "question: is empty"),
    (changed(question="a \ud800 b"), "question: holds half a surrogate pair"),
    (changed(id=1.5), "id: expected text, got the number 1.5"),
    (changed(rationales=None), "rationales: is missing"),
    (changed(rationales=[]), "rationales: has none"),
    (changed(rationales="text"), "rationales: expected a list, got text"),
    (changed(rationales=["text"]), "rationales[0]: expected teacher and text, got text"),
    (changed(rationales=texts("fine", "")), "rationales[1].text: is empty"),
    (changed(rationales=texts("fine", None)), "rationales[1].text: is missing"),
    (changed(rationales=texts(float("nan"))), "rationales[0].text: is NaN"),
    (changed(rationales=[{"text": "24"}]), "rationales[0].teacher: is missing"),
    (
        changed(rationales=[{"teacher": "a", "text": "1"}, {"teacher": "a", "text": "2"}]),
        "rationales: teacher 'a' occurs twice",
    ),
    (
        changed(rationales=[{"teacher": "a", "text": "1", "correct": "maybe"}]),
        "rationales[0].correct: expected true or false, got text",
    ),
    (changed(choices="A"), "choices: expected a list of texts, got text"),
    (changed(choices=["24"]), "choices: expected 2 to 26 options, got 1"),
    (changed(choices=["x", None]), "choices[1]: is missing"),
    (changed(choices=["x", "y"], answer="C"), "answer: 'C' is none of the 2 options"),
    ({**AUTHORS[0], "CoT": ["fine", ""]}, "CoT[1]: is empty"),
    ({**AUTHORS[0], "CoT": []}, "rationales: has none"),
    ({"Question": "?", "Answer": "1"}, "CoT: is missing"),
    ({**LISTS[1], "teachers": ["a", "b"]}, "teachers: 2 names for 1 completions"),
    ({**LISTS[1], "teachers": None}, "teachers: is missing"),
    ({**LISTS[1], "messages": "hi"}, "messages: expected a list of messages, got text"),
    (
        {**LISTS[0], "messages": [{"role": "assistant", "content": "x"}]},
        "messages: must end in the user's turn, ends in 'assistant'",
    ),
    ({**LISTS[0], "messages": [{"role": "user"}]}, "messages[0].content: is missing"),
    ({**ROWS[0], "teacher": None}, "teacher: is missing"),
    ({**ROWS[0], "completion": " "}, "completion: is empty"),
    ({"text": "hello"}, "no known kind of record; it has the fields text"),
    ([1, 2], "expected a record of named fields"),
    ("hello", "expected a record of named fields"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS, ids=[m[:40] for _, m in FAULTS])
def test_fault_is_named_with_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = jsonl(tmp_path, changed(id="first"), row)
    with pytest.raises(ValueError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2")
    assert message in str(caught.value)
    assert "1 row is faulty of 2 read" in str(caught.value)
    assert "\n" not in str(caught.value)
    questions = read_questions(path, on_error="skip")
    assert len(questions) == 1
    assert questions.skipped == 1


def test_duplicates_name_both_places(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, changed(id="b"), GOOD)
    with pytest.raises(ValueError, match=r"data.jsonl:3:id: 'a' occurs twice; first at .*jsonl:1"):
        read_questions(path)
    path = jsonl(tmp_path, *ROWS, ROWS[0])
    with pytest.raises(ValueError, match=r"data.jsonl:4:teacher: 'gpt' occurs twice"):
        read_questions(path)
    path = jsonl(tmp_path, ROWS[0], {**ROWS[2], "answer": "25"})
    with pytest.raises(ValueError, match=r"data.jsonl:2:answer: '25', but '24' at .*jsonl:1"):
        read_questions(path)
    path = jsonl(tmp_path, {**ROWS[0], "id": 1}, {**ROWS[1], "id": 1})
    with pytest.raises(ValueError, match=r"data.jsonl:2:id: '1' has another prompt at .*jsonl:1"):
        read_questions(path)


def test_true_line_numbers_beside_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b'\r\n\n  \n{"broken": \n' + b"\xff\xfe\n")
    with pytest.raises(ValueError) as caught:
        read_questions(path)
    assert f"{path}:4: is not valid JSON" in str(caught.value)
    assert f"{path}:5: byte 1 of the line is not UTF-8" in str(caught.value)
    assert len(read_questions(path, on_error="skip")) == 1


def test_many_faults_make_one_short_message(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *(changed(id=i, answer="") for i in range(50)))
    with pytest.raises(ValueError) as caught:
        read_questions(path)
    assert "and 47 more (50 rows are faulty of 50 read" in str(caught.value)
    assert len(str(caught.value)) < 600 + 4 * len(str(path))
    with pytest.raises(ValueError, match="no usable row"):
        read_questions(path, on_error="skip")


def test_quarantine_holds_every_faulty_row_and_its_reasons(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, changed(id="b", answer=""), ["?"])
    with path.open("ab") as file:
        file.write(b"{oops\n")
    quarantine = tmp_path / "folder" / "bad.jsonl"
    questions = read_questions(path, on_error="skip", quarantine=quarantine)
    assert (len(questions), questions.skipped, questions.rows) == (1, 3, 4)
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [r["place"] for r in rows] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert rows[0]["problems"] == [f"{path}:2:answer: is empty"] == questions.problems[:1]
    assert rows[0]["row"] == changed(id="b", answer="")
    assert rows[2]["row"] == "{oops"


def test_json_faults(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, changed(id="b", answer="")]))
    with pytest.raises(ValueError, match=r"data.json\[1\]:answer: is empty"):
        read_questions(path)
    path.write_text('[\n{"question": "x",\n]')
    with pytest.raises(ValueError, match=r"data.json:3: is not valid JSON"):
        read_questions(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no rows"):
        read_questions(path)
    path.write_text("5")
    with pytest.raises(ValueError, match="expected a list of records, got int"):
        read_questions(path)
    path.write_text(json.dumps({"version": 1, "data": [GOOD]}))
    assert len(read_questions(path)) == 1
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(changed(id='b'))}\n")
    assert len(read_questions(path)) == 2
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"data.json"):
        read_questions(path)


def test_csv_faults(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("question,answer,rationales\na,1\n")
    with pytest.raises(ValueError, match=r"data.csv:row 1: has 2 cells where the header has 3"):
        read_questions(path)
    path.write_text("question,answer,rationales\na,1,[oops\n")
    with pytest.raises(ValueError, match=r"data.csv:row 1:rationales: expected JSON in this cell"):
        read_questions(path)
    path.write_text('question,answer,rationales\na,"1,\n')
    with pytest.raises(ValueError, match=r"data.csv:\d: unexpected end of data"):
        read_questions(path)
    path.write_bytes(b"question,answer\n\xe9,1\n")
    with pytest.raises(ValueError, match=r"data.csv:2: byte 17 is not UTF-8"):
        read_questions(path)


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    jsonl(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(ValueError, match=r"trian.jsonl: no such file; did you mean train.jsonl\?"):
        read_questions(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match="no such file; there is no folder"):
        read_questions(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(ValueError, match=r"train: no such file; did you mean train.jsonl"):
        read_questions(tmp_path / "train")
    for name, content, message in (
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n \n", "the file is empty"),
        ("wide.jsonl", "{}".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("data.xml", b"<a/>", "unknown kind of file; known are .jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_questions(tmp_path / name)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD)
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_questions(path, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit=0"):
        read_questions(path, limit=0)


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, changed(id="b"), {"broken": True})
    assert [q.id for q in read_questions(path, limit=2)] == ["a", "b"]


def test_teachers_are_selected_by_name(tmp_path: Path) -> None:
    only = changed(id="b", rationales=texts("24"))
    questions = read_questions(jsonl(tmp_path, GOOD, only))
    assert teachers_of(questions) == ["gpt", "gemini", "t0"]
    assert [q.id for q in select_teachers(questions, ["gemini"])] == ["a"]
    with pytest.raises(ValueError, match=r"'gemni' is not in the data; did you mean gemini\?"):
        select_teachers(questions, ["gemni"])
