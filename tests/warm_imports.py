"""What commands and ranks that share imports have imported, before anything is computed. Nobody else imports this."""

import transformers.models.auto.tokenization_auto  # noqa: F401

import zoo.cli.main
import zoo.core.api
import zoo.core.launch.rank_start
import zoo.core.launch.serve
import zoo.core.run.worker  # noqa: F401
