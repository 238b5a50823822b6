"""Settings of the command that renders the course, `jupyter nbconvert --config` this file."""

c = get_config()  # noqa: F821 (nbconvert gives it)

c.NbConvertApp.export_format = "html"
c.NbConvertApp.notebooks = ["notebooks/*.ipynb"]
c.FilesWriter.build_directory = "build/course"
c.ExecutePreprocessor.enabled = True
c.TemplateExporter.extra_template_basedirs = ["notebooks/html"]
c.HTMLExporter.template_name = "course"
# Once more, after the cells have run: before, they have no outputs to remove. Off unless asked for.
c.Exporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
