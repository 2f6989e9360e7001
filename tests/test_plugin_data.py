"""Data, replay, resume and mistakes in a user's own LightningModule, seen from outside."""

import copy
import warnings
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler

import mmcl
from mmcl.core import Strategy
from mmcl.lightning.strategy_callback import _Doubtful
from tests.distributed.ranks import call_on_ranks
from tests.test_plugin import Foreign, data
from tests.toys.toy_clip import StandIn, task_batches

IGNORED = (
    ".*does not have many workers.*", ".*smaller than the logging interval.*", ".*LeafSpec.*",
    ".*has an inactive part.*", ".*treespec.*", ".*dataloader is not resumable.*",
    ".*Checkpoint directory.*", ".*You're resuming from a checkpoint that ended.*",
)  # fmt: skip


class Pictures:
    """Dataset of a task as torchvision has them: (image, class); it counts what was read."""

    def __init__(self, task, count=22):
        first, *others = task_batches(task, size=24)
        for other in others:
            first = first.join(other)
        self.images, self.labels, self.count = first.images, first.labels, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


DATA = [Pictures(task) for task in range(3)]


def fit(module, loader, callback=None, epochs=1, ckpt_path=None, devices=1, **options):
    """One task with a Trainer of its own."""
    callback = callback or mmcl.StrategyCallback()
    with warnings.catch_warnings():
        for sentence in IGNORED:
            warnings.filterwarnings("ignore", sentence)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, devices=devices,
            **{"enable_checkpointing": False, "callbacks": [callback], **options},
        )  # fmt: skip
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def a_chain(**options):
    replay = mmcl.strategies.ExperienceReplay(**{"buffer_size": 8, "replay_ratio": 0.25, **options})
    return mmcl.Chain([replay, mmcl.strategies.EWC(ewc_lambda=10.0)])


def a_module(strategy=None):
    return Foreign(a_chain() if strategy is None else strategy, StandIn())


def replaying(module, task, **options):
    options = {"batch_size": 8, **options}
    return mmcl.replay_loader(DATA[task], module.strategy, earlier=DATA[:task], **options)


def by_hand(tasks, epochs=1, batch_size=8):
    """The bare loop of the documentation over the same loaders."""
    model, strategy = StandIn(), a_chain()
    strategy.attach(model)
    for index in range(tasks):
        task = mmcl.Task(index, f"task {index}")
        mmcl.begin_task(model, strategy, task)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loader = mmcl.replay_loader(DATA[index], strategy, batch_size, earlier=DATA[:index])
        for _ in range(epochs):
            for batch in loader:
                done = mmcl.step(model, strategy, batch)
                optimizer.zero_grad()
                done.loss.backward()
                strategy.project_gradients(model)
                optimizer.step()
                strategy.after_step(model, done.batch, done.output)
        mmcl.end_task(model, strategy, task, loader.task_pass())
    return model, strategy


def equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, right[name], rtol=0, atol=0, msg=name)


def test_a_module_with_replay_learns_as_the_bare_loop_does():
    module = a_module()
    for task in range(3):
        fit(module, replaying(module, task), epochs=2)
    model, strategy = by_hand(3, epochs=2)
    equal(module.model.state_dict(), model.state_dict())
    memory, other = module.strategy.members[0].memory, strategy.members[0].memory
    assert set(memory.task_ids.tolist()) == {0, 1, 2}
    assert memory.sample_ids.tolist() == other.sample_ids.tolist()


def test_a_plan_that_no_loader_realizes_is_named_when_the_task_ends():
    module = a_module()
    plain = [DataLoader(each, batch_size=8, collate_fn=mmcl.collate_images) for each in DATA]
    fit(module, plain[0], mmcl.StrategyCallback(eval_collate_fn=mmcl.collate_images))
    with pytest.warns(UserWarning, match="planned to replay 8 stored samples and no batch"):
        fit(module, plain[1], mmcl.StrategyCallback(eval_collate_fn=mmcl.collate_images))


class Passed(Strategy):
    """Notes what ``end_task`` is given, twice, as a chain's members read it."""

    def __init__(self, plan=None):
        super().__init__()
        self.seen, self.plan = [], plan

    def replay_plan(self):
        return self.plan

    def end_task(self, model, task, batches):
        for _ in range(2):
            rows = []
            for batch in batches:
                ids = range(len(batch)) if batch.sample_ids is None else batch.sample_ids
                means = batch.images.float().mean((1, 2, 3)).tolist()
                rows += zip(map(int, ids), batch.labels.tolist(), means, strict=True)
            self.seen.append(rows)


def expected(task, count=22):
    pairs = [DATA[task][number] for number in range(count)]
    means = [image.float().mean().item() for image, _ in pairs]
    return [(n, label, mean) for n, ((_, label), mean) in enumerate(zip(pairs, means, strict=True))]


def test_the_pass_over_a_shuffled_loader_that_drops_its_last_batch_has_every_sample_once():
    module = a_module(Passed())
    loader = DataLoader(
        DATA[0], batch_size=8, shuffle=True, drop_last=True, collate_fn=mmcl.collate_images
    )
    fit(module, loader, mmcl.StrategyCallback(eval_collate_fn=mmcl.collate_images))
    assert module.strategy.seen == [expected(0)] * 2


def test_the_pass_has_the_samples_that_a_sampler_chooses_and_no_others():
    module, chosen = a_module(Passed()), [3, 17, 4, 9]
    loader = DataLoader(
        DATA[0], batch_size=3, sampler=SubsetRandomSampler(chosen), collate_fn=mmcl.collate_images
    )
    fit(module, loader, mmcl.StrategyCallback(eval_collate_fn=mmcl.collate_images))
    assert module.strategy.seen == [[expected(0)[number] for number in sorted(chosen)]] * 2


def test_the_pass_with_a_sampler_that_draws_again_is_warned_of():
    module, draws = a_module(Passed()), RandomSampler(DATA[0], replacement=True, num_samples=6)
    loader = DataLoader(DATA[0], batch_size=3, sampler=draws, collate_fn=mmcl.collate_images)
    _Doubtful._warned_of.clear()
    with pytest.warns(UserWarning, match="or a sampler of its own"):
        fit(module, loader, mmcl.StrategyCallback(eval_collate_fn=mmcl.collate_images))
    assert len(module.strategy.seen[0]) == 6


def test_replayed_samples_of_a_users_loader_are_no_new_ones():
    new, old = (mmcl.collate_images([DATA[t][i] for i in range(6)], task=t) for t in (1, 0))
    is_replay = torch.ones(6, dtype=torch.bool)
    mixed = new.join(mmcl.Batch(old.images, old.labels, old.task_ids, is_replay=is_replay))
    herding = mmcl.strategies.ExperienceReplay(8, selection="herding")
    callback = mmcl.StrategyCallback(mmcl.Task(1, "one"), task_loader=[mixed])
    fit(a_module(herding), data([mixed]), callback)
    assert set(herding.memory.labels.tolist()) <= {2, 3}
    assert len(herding.memory) == 6


def test_our_collate_functions_are_used_without_augmentation_in_the_pass():
    model = mmcl.OpenCLIP("tiny", pretrained="built-in", random_crop_scale=0.2)
    model.set_classes(["a", "b"], ["{}"])
    module = Foreign(Passed(), model)
    images = torch.randint(0, 256, (6, 3, 80, 80), dtype=torch.uint8)
    pairs = [(image, n % 2) for n, image in enumerate(images)]
    collate = mmcl.ImageLabelCollate(model.transform(True))
    fit(module, DataLoader(pairs, batch_size=4, shuffle=True, collate_fn=collate))
    plain = model.transform(False)
    means = [plain(image, None, 0).image.float().mean().item() for image in images]
    assert [row[2] for row in module.strategy.seen[0]] == means


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([mmcl.collate_images([DATA[0][i] for i in range(8)])])


def test_a_pass_that_may_not_be_exact_is_said_once():
    module = a_module(Passed())
    _Doubtful._warned_of.clear()
    with pytest.warns(
        UserWarning, match="no map-style dataset .*: give StrategyCallback a task_lo"
    ):
        fit(module, DataLoader(Streamed(), batch_size=None))
    fit(module, DataLoader(Streamed(), batch_size=None))  # a second warning would be an error


def test_tuples_in_the_pass_name_what_to_do():
    class Pairs(Foreign):
        def training_step(self, batch, number):
            return super().training_step(mmcl.Batch.from_images(*batch), number)

    module = Pairs(Passed(), StandIn())
    with (
        pytest.warns(UserWarning, match="as the training loader's collate_fn makes them"),
        pytest.raises(TypeError, match=r"collate_fn returned list, expected a mmcl.Batch: use"),
    ):
        fit(module, DataLoader(DATA[0], batch_size=8))


def test_the_task_number_survives_a_checkpoint_in_a_new_module():
    module = a_module()
    for task in range(2):
        fit(module, replaying(module, task))
    state = copy.deepcopy(module.state_dict())
    fit(module, replaying(module, 2))
    new = a_module()
    new.load_state_dict(state)
    fit(new, replaying(new, 2))
    assert new.strategy.current_task.index == 2
    equal(module.state_dict(), new.state_dict())
    assert set(new.strategy.members[0].memory.task_ids.tolist()) == {0, 1, 2}


def test_a_strategy_that_grows_is_loaded_after_its_tasks_have_begun():
    def grows():
        return a_module(mmcl.strategies.OLoRA(rank=2))

    module = grows()
    for task in range(2):
        fit(module, replaying(module, task))
    state, new = copy.deepcopy(module.state_dict()), grows()
    assert mmcl.begin_tasks(new.model, new.strategy, state) == 1
    new.load_state_dict(state)
    for each in (module, new):
        fit(each, replaying(each, 2))
    equal(module.state_dict(), new.state_dict())
    assert mmcl.begin_tasks(StandIn(), grows().strategy, {}) is None


def test_a_given_task_overrides_the_number():
    module = a_module()
    fit(module, replaying(module, 0))
    fit(module, replaying(module, 1), mmcl.StrategyCallback(mmcl.Task(1, "named")))
    assert module.strategy.current_task.name == "named"


class Stop(pl.Callback):
    """Saves a checkpoint after a number of batches and ends the run there."""

    def __init__(self, after, file):
        self.after, self.file = after, file

    def on_train_batch_end(self, trainer, *others):
        self.after -= 1
        if self.after == 0:
            trainer.save_checkpoint(self.file)
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_fit_killed_at_any_step_resumes_in_a_new_module(tmp_path, after):
    module = a_module()
    for task in range(2):
        fit(module, replaying(module, task), epochs=2)
    killed, file = a_module(), tmp_path / "last.ckpt"
    fit(killed, replaying(killed, 0), epochs=2)
    stop = [mmcl.StrategyCallback(), Stop(after, file)]
    with pytest.raises(SystemExit):
        fit(killed, replaying(killed, 1), epochs=2, callbacks=stop)
    new = a_module()
    fit(new, replaying(new, 1), epochs=2, ckpt_path=file)
    equal(module.state_dict(), new.state_dict())


def test_a_checkpoint_of_an_ended_task_is_not_continued(tmp_path):
    module, file = a_module(), tmp_path / "end.ckpt"
    trainer = fit(module, replaying(module, 0))
    trainer.save_checkpoint(file)
    new = a_module()
    with pytest.raises(ValueError, match=r"when task 0 had ended.*mmcl.begin_tasks"):
        fit(new, replaying(new, 0), ckpt_path=file)


def test_a_trainer_that_trained_a_task_is_refused():
    module, callback = a_module(), mmcl.StrategyCallback()
    trainer = fit(module, replaying(module, 0), callback)
    with pytest.raises(RuntimeError, match=r"trained a task before .* make a new pl.Trainer"):
        trainer.fit(module, replaying(module, 1))


def test_a_precision_that_converts_all_state_is_refused():
    module = a_module()
    with pytest.raises(ValueError, match=r"precision is 'bf16-true', .*: use 'bf16-mixed'"):
        fit(module, replaying(module, 0), precision="bf16-true")


def test_evaluation_fills_a_matrix():
    module = a_module(mmcl.strategies.Finetune())
    matrix = mmcl.AccuracyMatrix(
        "pictures", "class", [mmcl.evaluation.Column(f"t{t}") for t in (0, 1)]
    )
    for task in range(2):
        fit(module, replaying(module, task), epochs=3)
        for column in range(2):
            loader = DataLoader(DATA[column], batch_size=5, collate_fn=mmcl.collate_images)
            matrix.set(task + 1, column, mmcl.evaluate(module.model, module.strategy, loader))
    right = 0
    for image, label in (DATA[1][i] for i in range(22)):
        logits = module.model(mmcl.Batch.from_images(image[None])).logits
        right += int(logits.argmax()) == label
    assert matrix.get(2, 1) == pytest.approx(right / 22)
    assert matrix.get(1, 0) >= 0.5
    only = mmcl.evaluate(module.model, module.strategy, loader, allowed=[2])
    assert only == pytest.approx(sum(label == 2 for _, label, _ in expected(1)) / 22)
    assert module.model.training
    with pytest.raises(ValueError, match="the loader gave no batch to evaluate"):
        mmcl.evaluate(module.model, module.strategy, [])


def scored(rank, world):
    module = a_module(mmcl.strategies.Finetune())
    rows = list(range(rank, 22, world))
    loader = [mmcl.collate_images([DATA[0][i] for i in rows])]
    return mmcl.evaluate(module.model, module.strategy, loader)


def stepped(rank, world):
    """Two tasks of the bare loop under DDP."""
    model, strategy = StandIn(), a_chain()
    strategy.attach(model)
    for index in range(2):
        task = mmcl.Task(index, f"task {index}")
        mmcl.begin_task(model, strategy, task)
        module = mmcl.StepModule(model, strategy)
        ddp = torch.nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loader = mmcl.replay_loader(DATA[index], strategy, 8 // world, earlier=DATA[:index])
        for batch in loader:
            loss = ddp(batch)["loss"] * batch.loss_weight
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            strategy.after_step(model, module.last_step.batch, module.last_step.output)
        mmcl.end_task(model, strategy, task, loader.task_pass())
    memory = strategy.members[0].memory
    return dict(model.state_dict()), memory.sample_ids


def half_replayed(rank, world):
    """A task in which only rank 0 meets a replayed sample, and one in which no rank does."""
    said = []
    for has_replay in (True, False):
        model, strategy = StandIn(), a_chain()
        strategy.attach(model)
        strategy.members[0].memory.add_range(0, 22)
        task = mmcl.Task(1, "one")
        mmcl.begin_task(model, strategy, task)
        batch = mmcl.collate_images([DATA[1][i] for i in range(4)], task=1)
        is_replay = torch.tensor([has_replay and rank == 0, False, False, False])
        mmcl.step(model, strategy, replace(batch, is_replay=is_replay))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mmcl.end_task(model, strategy, task, [batch])
        said.append(any("planned to replay" in str(one.message) for one in caught))
    return said


@pytest.mark.slow
def test_a_rank_without_replayed_samples_is_no_reason_to_warn(tmp_path):
    assert call_on_ranks(half_replayed, tmp_path) == [[False, True]] * 2


@pytest.mark.slow
def test_two_processes_of_the_bare_loop_learn_as_one(tmp_path):
    one, two = call_on_ranks(stepped, tmp_path)
    model, strategy = by_hand(2)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[0][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(one[0][name], two[0][name])
    assert one[1].tolist() == strategy.members[0].memory.sample_ids.tolist()
    both = call_on_ranks(scored, tmp_path / "scores")
    assert both[0] == both[1] == pytest.approx(scored(0, 1))


class Inputs:
    """Inputs of transformers' Trainer: batches under their name."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ({"batch": batch} for batch in self.loader)


@pytest.mark.slow
def test_transformers_trainer_learns_as_the_bare_loop_does(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Replaying(transformers.Trainer):
        def get_train_dataloader(self):
            return Inputs(self.train_dataset)

    model, strategy = StandIn(), a_chain()
    strategy.attach(model)
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, learning_rate=0.05, optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    for index in range(3):
        loader = mmcl.replay_loader(DATA[index], strategy, 8, earlier=DATA[:index])
        module, task = mmcl.StepModule(model, strategy), mmcl.Task(index, f"task {index}")
        callback = mmcl.HFTrainerCallback(module, task, loader.task_pass())
        Replaying(module, settings, train_dataset=loader, callbacks=[callback]).train()
    own, other = by_hand(3, epochs=2)
    equal(model.state_dict(), own.state_dict())
    assert strategy.is_task_ended
    assert torch.equal(strategy.members[0].memory.sample_ids, other.members[0].memory.sample_ids)
