"""JupyterLab on the users' node. The token comes from the file that JUPYTER_TOKEN_FILE names."""

c = get_config()  # noqa: F821 - Jupyter defines it

# The port is published by Swarm; requests from other origins are refused, as by default.
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.port = 8888
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.quit_button = False
# The token is the cluster's secret; a password set by one who has it would outlive it in the home.
c.PasswordIdentityProvider.allow_password_change = False
c.FileContentsManager.delete_to_trash = False
c.LabApp.extension_manager = "readonly"
