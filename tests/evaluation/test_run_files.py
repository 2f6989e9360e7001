from mmcl.evaluation.run_files import predictions_path


def test_the_path_of_predictions_names_row_and_column(tmp_path):
    assert predictions_path(tmp_path, 3, 12) == tmp_path / "answers" / "row_03" / "col_12.jsonl"
