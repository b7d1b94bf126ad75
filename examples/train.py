"""Train a model on real data, dense or with Top-K compressed gradients.

    torchrun --standalone --nproc-per-node=2 train.py --model simple_cnn --dataset mnist \\
        --epochs 5 --compress --ratio 0.01

Started without torchrun it trains in one process. `train.py --help` lists the options; --config
reads them from YAML.
"""

from __future__ import annotations

from collections.abc import Sequence

from options import parse_options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line (default: that of this process) says."""
    options = parse_options(arguments)
    # After the options: a mistyped one should not wait for torch to load.
    import checkpoints
    import datasets
    import report
    import training
    from processes import joined

    with joined(options) as processes:
        processes.all_or_none(
            lambda: datasets.fetch(options.dataset, options.data_dir), only_first_on_machine=True
        )
        loaded: list[datasets.Data] = []
        processes.all_or_none(
            lambda: loaded.append(datasets.load(options.dataset, options.data_dir))
        )
        run = training.build(options, processes, loaded[0])
        if options.resume:
            checkpoints.resume(run)
        if options.tensorboard_dir is not None and processes.is_main:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run writes its steps anew from the checkpoint on.
            run.writer = SummaryWriter(
                str(options.tensorboard_dir), purge_step=len(run.history) * len(run.loader) + 1
            )

        while len(run.history) < run.epochs:
            training.train_epoch(run)
            if options.checkpoint_dir is not None:
                checkpoints.save(run)

        if run.writer is not None:
            run.writer.close()
        if processes.is_main:
            figures = report.results(run)
            print(report.table(figures), flush=True)
            if options.results is not None:
                report.write(figures, options.results)


if __name__ == "__main__":
    main()
